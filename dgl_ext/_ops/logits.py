"""Where the gradients are rewired: a `torch.autograd.Function` over the dispatcher ops.

A forward op returns the logits of all branches, and the backward op takes their gradients to the
inputs that the method lets them reach: the fused branch's to the head, a unimodal branch's to its
encoder, and shares of the others where a leak is open. What nothing reaches gets `None`, as
autograd gives for a detached tensor, and not zeros, by which AdamW would still decay a parameter.
(torch.compile traces backward with a gradient for every output, so that there it does get zeros.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch_private
from .._arguments.heads import HEADS, Biases, Features, Weights
from . import library
from .library import Executor

Outputs = tuple[Tensor, ...]
# Of each weight, then of each bias: the unimodal branches that it takes part in.
Branches = tuple[tuple[int, ...], ...]

# y alone meets the film layer's bias, but not its weight.
_FILM_BRANCHES: Branches = ((0,), (0, 1), (0, 1), (0, 1))


def _linear_branches(modalities: int, weights: int) -> Branches:
    each = tuple((i,) for i in range(modalities))
    every = (tuple(range(modalities)),)
    return 2 * (every if weights == 1 else each)


# forward's arguments before the tensors: options, which have no gradient.
_OPTIONS = 6
_NO_GRADS = (None,) * _OPTIONS


def _reached(
    needs: Sequence[bool], there: Sequence[bool], branches: Branches, leaks: tuple[float, float]
) -> Sequence[bool]:
    """Narrows the needs to what the gradients reach that are there, the fused branch's first."""
    if all(there):
        return needs
    (fused, *unimodal), (encoder_leak, head_leak) = there, leaks
    reached = [own or (fused and encoder_leak != 0) for own in unimodal]
    reached += [fused or (head_leak != 0 and any(unimodal[i] for i in own)) for own in branches]
    return [need and reach for need, reach in zip(needs, reached, strict=True)]


_NO_SECOND = 'dgl_ext: this backend has no second derivatives; use backend="reference" for them'


class _RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients on, tied to what they depend on by a node that raises.

    `once_differentiable` ties them to the incoming gradients only: where those are constants, the
    second derivative by a feature or weight would be zero without a word.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(_NO_SECOND)


class FusionHead(torch.autograd.Function):
    """The logits of any head."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        modalities: int,
        encoder_leak: float,
        head_leak: float,
        executor: Executor,
        masks: int,
        *tensors: Any,
    ) -> Outputs:
        """Takes features, weights, biases and masks, flat; returns the logits, fused first."""
        features, weights, biases, present = library.split(tensors, modalities, masks)
        results = library.call(
            f"{op}_forward", executor, features[0], features, weights, biases, present
        )
        outputs, film = tuple(results[: modalities + 1]), results[modalities + 1 :]
        # FiLM's backward takes its biases too, and the modulation that forward returns.
        kept = (*biases, *film) if film else ()
        ctx.save_for_backward(*features, *weights, *kept, *present)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.executor, ctx.leaks = op, executor, (encoder_leak, head_leak)
        ctx.weights, ctx.masks = len(weights), masks
        ctx.branches = _FILM_BRANCHES if film else _linear_branches(modalities, len(weights))
        # The masks, which come last, have no gradient.
        ctx.needs = needs = ctx.needs_input_grad[_OPTIONS : len(ctx.needs_input_grad) - masks]
        if not any(needs) or (all(needs[:modalities]) and any(needs[modalities:])):
            return outputs  # nearly always: nothing needs one, or every branch's reaches something
        # The logits whose gradient could reach nothing do not require grad, as if the reference had
        # computed them from detached tensors.
        count = modalities + 1
        alone = [[i == k for i in range(count)] for k in range(count)]
        live = [any(_reached(needs, there, ctx.branches, ctx.leaks)) for there in alone]
        ctx.mark_non_differentiable(*[z for z, a in zip(outputs, live, strict=True) if not a])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Takes the logits' gradients to the inputs that they may reach, `None` to the others."""
        saved = ctx.saved_tensors  # once: checkpointing lets them be read no more than that
        there = [grad is not None for grad in grad_outputs]
        needs = _reached(ctx.needs, there, ctx.branches, ctx.leaks)
        grads: Sequence[Tensor] = ()
        if any(needs):
            modalities = len(grad_outputs) - 1
            middle, end = modalities + ctx.weights, len(saved) - ctx.masks
            *biases, film = saved[middle:end] or (None,)
            kept: tuple[Any, ...] = () if film is None else (biases, film)
            grads = library.call(
                f"{ctx.op}_backward",
                ctx.executor,
                saved[0],
                grad_outputs,
                saved[:modalities],
                saved[modalities:middle],
                *kept,
                saved[end:],
                *library.split(needs, modalities)[:3],
                *ctx.leaks,
            )
            if torch.is_grad_enabled():  # backward(create_graph=True)
                # A batch would leave the node below behind.
                if any(map(_torch_private.is_batched, grad_outputs)):
                    raise RuntimeError(_NO_SECOND)
                grads = _RefuseSecondDerivative.apply(len(grads), *grads, *grad_outputs, *saved)
        dealt = iter(grads)
        rest = (None,) * ctx.masks
        return (*_NO_GRADS, *[next(dealt) if need else None for need in needs], *rest)


def apply(
    fusion: str,
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
    present: Sequence[Tensor | None] = (),
    executor: Executor = Executor.AUTO,
) -> Outputs:
    """Returns a head's logits, fused first, with disentangled gradients behind them."""
    outputs: Outputs = FusionHead.apply(
        HEADS[fusion].op,
        len(features),
        encoder_leak,
        head_leak,
        executor,
        len(present),
        *features,
        *weights,
        *biases,
        *present,
    )
    return outputs

"""Where the gradients are rewired: a `torch.autograd.Function` over the dispatcher ops.

A forward op returns the logits of all branches, and the backward op takes their gradients to the
inputs that the method lets them reach: the fused branch's to the head, a unimodal branch's to its
encoder, and shares of the others where a leak is open. What nothing reaches gets `None`, as
autograd gives for a detached tensor, and not zeros, by which AdamW would still decay a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch_private
from .._arguments.heads import HEADS, Biases, Features, Weights
from . import library
from .library import Executor

Outputs = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]


class BranchParameters(NamedTuple):
    """Which parameters take part in each unimodal branch: tuples of their indices, per branch."""

    weights: tuple[tuple[int, ...], ...]
    biases: tuple[tuple[int, ...], ...]


def _linear_parameters(modalities: int, weights: int) -> BranchParameters:
    own = tuple((0 if weights == 1 else i,) for i in range(modalities))
    return BranchParameters(own, own)


# forward's arguments before the tensors: options, which have no gradient.
_OPTIONS = 6
_NO_GRADS = (None,) * _OPTIONS

# y alone meets the film layer's bias, but not its weight.
_FILM_PARAMETERS = BranchParameters(((0, 1), (1,)), ((0, 1), (0, 1)))


def _split(flat: Sequence[Any], modalities: int) -> tuple[Any, Any, Any]:
    """Takes a flat sequence apart: features, weights and as many biases."""
    end = modalities + (len(flat) - modalities) // 2
    return flat[:modalities], flat[modalities:end], flat[end:]


def _split_masks(flat: Sequence[Any], masks: int) -> tuple[Any, Any]:
    """Takes the masks, which come last, from a flat sequence."""
    end = len(flat) - masks
    return flat[:end], flat[end:]


def _reached_parameters(branches: tuple[tuple[int, ...], ...], there: Sequence[bool]) -> set[int]:
    """The parameters that take part in a unimodal branch that is there."""
    return {i for own, present in zip(branches, there, strict=True) if present for i in own}


def _reached(
    needs: Sequence[bool],
    grads: Grads,
    taking_part: BranchParameters,
    leaks: tuple[float, float],
) -> Sequence[bool]:
    """Narrows the needs to what the gradient of some branch reaches."""
    fused, *unimodal = [grad is not None for grad in grads]
    if fused and all(unimodal):
        return needs
    encoder_leak, head_leak = leaks
    features, weights, biases = _split(needs, len(unimodal))
    to_encoders = fused and encoder_leak != 0
    reached = [need and (own or to_encoders) for need, own in zip(features, unimodal, strict=True)]
    for parameters, branches in ((weights, taking_part.weights), (biases, taking_part.biases)):
        reached_by = _reached_parameters(branches, unimodal) if head_leak != 0 else set()
        reached += [need and (fused or i in reached_by) for i, need in enumerate(parameters)]
    return reached


def _prepare(
    ctx: Any,
    outputs: Outputs,
    leaks: tuple[float, float],
    executor: Executor,
    masks: int,
) -> None:
    """Keeps what backward decides by, and marks the logits whose gradient could reach nothing.

    Those then do not require grad, as if the reference had computed them from detached tensors.
    """
    ctx.set_materialize_grads(False)
    ctx.leaks, ctx.executor = leaks, executor
    # The masks, which come last, have no gradient.
    end = len(ctx.needs_input_grad) - masks
    ctx.needs, ctx.masks = ctx.needs_input_grad[_OPTIONS:end], masks
    if all(ctx.needs):
        return
    encoder_leak, head_leak = leaks
    features, weights, biases = _split(ctx.needs, len(outputs) - 1)
    live = [any(weights) or any(biases) or (encoder_leak != 0 and any(features))]
    for i, need in enumerate(features):
        leaked = head_leak != 0 and (
            any(weights[w] for w in ctx.taking_part.weights[i])
            or any(biases[b] for b in ctx.taking_part.biases[i])
        )
        live.append(need or leaked)
    constant = [output for output, alive in zip(outputs, live, strict=True) if not alive]
    if constant:
        ctx.mark_non_differentiable(*constant)


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


def _call_backward(
    ctx: Any, grad_outputs: Grads, saved: Sequence[Tensor], arguments: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Computes the gradients that are needed and puts `None` in the place of the others.

    `saved` are the context's tensors, a feature first.
    """
    needs = _reached(ctx.needs, grad_outputs, ctx.taking_part, ctx.leaks)
    rest = (None,) * ctx.masks
    if not any(needs):
        return (*_NO_GRADS, *(None for _ in needs), *rest)
    split_needs = _split(needs, len(grad_outputs) - 1)
    name = f"{ctx.op}_backward"
    grads: Sequence[Tensor] = library.call(
        name, ctx.executor, saved[0], grad_outputs, *arguments, *split_needs, *ctx.leaks
    )
    if torch.is_grad_enabled():  # backward(create_graph=True)
        # A batch would leave the node below behind.
        if any(map(_torch_private.is_batched, grad_outputs)):
            raise RuntimeError(_NO_SECOND)
        grads = _RefuseSecondDerivative.apply(len(grads), *grads, *grad_outputs, *saved)
    if len(grads) == len(needs):
        return (*_NO_GRADS, *grads, *rest)
    dealt = iter(grads)
    return (*_NO_GRADS, *[next(dealt) if need else None for need in needs], *rest)


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
        tensors, present = _split_masks(tensors, masks)
        features, weights, biases = _split(tensors, modalities)
        results = library.call(
            f"{op}_forward", executor, features[0], features, weights, biases, present
        )
        outputs, film = tuple(results[: modalities + 1]), results[modalities + 1 :]
        # FiLM's backward takes its biases too, and the modulation that forward returns.
        kept = (*biases, *film) if film else ()
        ctx.save_for_backward(*features, *weights, *kept, *present)
        ctx.op, ctx.weights = op, len(weights)
        ctx.taking_part = _FILM_PARAMETERS if film else _linear_parameters(modalities, len(weights))
        _prepare(ctx, outputs, (encoder_leak, head_leak), executor, masks)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Takes the logits' gradients to the inputs that they may reach."""
        saved = ctx.saved_tensors  # once: checkpointing lets them be read no more than that
        tensors, present = _split_masks(saved, ctx.masks)
        end = len(grad_outputs) - 1 + ctx.weights
        features, weights = tensors[: len(grad_outputs) - 1], tensors[len(grad_outputs) - 1 : end]
        *biases, film = tensors[end:] or (None,)
        kept: tuple[Any, ...] = () if film is None else (biases, film)
        return _call_backward(ctx, grad_outputs, saved, (features, weights, *kept, present))


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

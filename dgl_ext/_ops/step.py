"""The training step under autograd: an op that returns the loss together with every gradient.

The forward op computes the gradients too, since at its end all that they are made of is at hand;
`backward` multiplies them by the gradient of the total, and does nothing where that is 1.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch_private
from .._arguments.cross_entropy import LossNumbers
from .._arguments.heads import Biases, Features, Weights
from ..settings import workspace_limit
from ..types import DecoupledLoss, is_unit_gradient
from . import library
from .library import Executor


class StepOptions(NamedTuple):
    """What makes up a step besides tensors: the op, how it runs, and the user's numbers."""

    op: str
    executor: Executor
    modalities: int
    masks: int
    numbers: LossNumbers
    leaks: tuple[float, float]


# forward's arguments before the tensors of the head, which have no gradient.
_OPTIONS = 6
_NO_GRADS = (None,) * _OPTIONS
# The op's results before the gradients: the total, and what is detached of it.
_RESULTS = 6


class TrainingStep(torch.autograd.Function):
    """Loss and gradients of any head."""

    @staticmethod
    def forward(
        ctx: Any,
        options: StepOptions,
        limit: int,
        grad_enabled: bool,  # here it no longer is
        target: Tensor,
        class_weight: Tensor | None,
        sample_weight: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """Takes features, weights, biases and masks in one flat list; returns a `DecoupledLoss`."""
        needs = ctx.needs_input_grad[_OPTIONS:] if grad_enabled else (False,) * len(tensors)
        *head, present = library.split(tensors, options.modalities, options.masks)
        *head_needs, _ = library.split(needs, options.modalities, options.masks)
        results = library.call(
            f"{options.op}_step",
            options.executor,
            tensors[0],
            *head,
            target,
            class_weight,
            sample_weight,
            present,
            *options.numbers,
            *head_needs,
            *options.leaks,
            limit,
        )
        total, *parts = results[:_RESULTS]
        grads = results[_RESULTS:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*parts)
        # save_for_backward frees these before AccumulateGrad runs, which can then move them into
        # `.grad` instead of copying.
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.to_float16 = tensors[0].dtype == torch.float16
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Scales the gradients that forward computed by that of the total."""
        scale = grad_outputs[0]
        if scale is None:
            return (*_NO_GRADS, *(None for _ in ctx.needs))
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise RuntimeError(
                "dgl_ext: a training step has no second derivatives; "
                'use backend="reference" for them'
            )
        if torch.compiler.is_compiling() or ctx.to_float16 or _torch_private.is_batched(scale):
            grads: Sequence[Tensor]
            grads = library.scale_gradients(ctx.saved_tensors, scale, ctx.to_float16)
        else:
            with _one_at_a_time:
                grads = _scaled(ctx, scale)
        dealt = iter(grads)
        return (*_NO_GRADS, *[next(dealt) if need else None for need in ctx.needs])


# A backward that frees its graph hands out what another thread's may be about to read.
_one_at_a_time = threading.RLock()


def _scaled(ctx: Any, scale: Tensor) -> Sequence[Tensor]:
    """Multiplies by `scale`, in place where nobody will ask for the gradients again."""
    grads: Sequence[Tensor] = ctx.saved_tensors
    if getattr(ctx, "spent", False):  # by a backward that has not yet returned
        raise RuntimeError(
            "dgl_ext: two threads differentiated one training step, and the first one frees it: "
            "use retain_graph=True in both"
        )
    kept = _torch_private.keeps_graph()
    ctx.spent = not kept
    # Fake tensors and other subclasses may have no value to look at.
    readable = type(scale) is Tensor and scale.is_cpu
    if is_unit_gradient(scale) or (readable and scale.item() == 1):
        # What is kept for the next backward is not what this one hands out.
        return [grad.clone() for grad in grads] if kept else grads
    if kept:
        return library.scale_gradients(grads, scale, to_float16=False)
    library.scale_gradients_(grads, scale)
    return grads


def apply(
    options: StepOptions,
    features: Features,
    weights: Weights,
    biases: Biases,
    constants: tuple[Tensor, Tensor | None, Tensor | None],
    present: Sequence[Tensor | None],
) -> DecoupledLoss:
    """Returns the loss of a head, with disentangled gradients behind its total.

    `constants` are the target, the class weight and the sample weight.
    """
    total, branch_losses, *per_branch = TrainingStep.apply(
        options,
        workspace_limit() or 0,  # the device's default
        torch.is_grad_enabled(),
        *constants,
        *features,
        *weights,
        *biases,
        *present,
    )
    fused, *unimodal = branch_losses.unbind()
    return DecoupledLoss(total, fused, tuple(unimodal), *per_branch)

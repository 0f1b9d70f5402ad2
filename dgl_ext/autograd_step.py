"""The training step under autograd: an op that returns the loss together with every gradient.

The forward op computes the gradients too, since at its end all that they are made of is at hand;
`backward` multiplies them by the gradient of the total, and does nothing where that is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._ops import Path
from .cross_entropy import CrossEntropy
from .heads import Biases, Features, Weights
from .settings import workspace_limit
from .types import DecoupledLoss

_OPS = {"concat": "linear_head_step", "sum": "linear_head_step", "film": "film_head_step"}

# forward's arguments before the features: options and what has no gradient.
_OPTIONS = 12


class TrainingStep(torch.autograd.Function):
    """Loss and gradients of any head."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        path: Path,
        counts: tuple[int, int],
        alpha: tuple[float, ...],
        mean: bool,
        ignore_index: int,
        label_smoothing: float,
        encoder_leak: float,
        head_leak: float,
        limit: int,
        grad_enabled: bool,
        target: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes features, weights, biases and masks in one flat list; returns loss, parts, hits."""
        modalities, parameters = counts
        ends = modalities, modalities + parameters, modalities + 2 * parameters
        needs = ctx.needs_input_grad[_OPTIONS : _OPTIONS + ends[2]]
        if not grad_enabled:
            needs = (False,) * ends[2]
        total, losses, correct, *grads = _ops.call(
            op,
            path,
            tensors[0],
            tensors[: ends[0]],
            tensors[ends[0] : ends[1]],
            tensors[ends[1] : ends[2]],
            target,
            tensors[ends[2] :],
            alpha,
            mean,
            ignore_index,
            label_smoothing,
            needs[: ends[0]],
            needs[ends[0] : ends[1]],
            needs[ends[1] :],
            encoder_leak,
            head_leak,
            limit,
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, correct)
        # Freed before autograd stores them, which so can take them for `.grad` without a copy.
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.without = (None,) * (len(tensors) - ends[2])
        ctx.to_float16 = tensors[0].dtype == torch.float16
        return total, losses, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        """Scales the gradients that forward computed by that of the total."""
        options = (None,) * _OPTIONS
        scale = grad_outputs[0]
        if scale is None:
            return (*options, *(None for _ in ctx.needs), *ctx.without)
        if torch.is_grad_enabled():  # backward(create_graph=True)
            raise RuntimeError(
                "dgl_ext: a training step has no second derivatives; "
                'use backend="reference" for them'
            )
        grads = _scaled(ctx.saved_tensors, scale, ctx.to_float16)
        if len(grads) == len(ctx.needs):
            return (*options, *grads, *ctx.without)
        dealt = iter(grads)
        return (*options, *[next(dealt) if need else None for need in ctx.needs], *ctx.without)


def _scaled(grads: Sequence[Tensor], scale: Tensor, to_float16: bool) -> Sequence[Tensor]:
    """Multiplies by `scale`, in place where nobody will ask for the gradients again."""
    if not torch.compiler.is_compiling() and not to_float16:
        if scale.device.type == "cpu" and scale.item() == 1:
            return grads
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            _ops.scale_gradients_(grads, scale)
            return grads
    return _ops.scale_gradients(grads, scale, to_float16)


def apply(
    fusion: str,
    features: Features,
    weights: Weights,
    biases: Biases,
    loss: CrossEntropy,
    encoder_leak: float,
    head_leak: float,
    path: Path = Path.PLANNED,
) -> DecoupledLoss:
    """Returns the loss of a head, with disentangled gradients behind its total."""
    total, losses, correct = TrainingStep.apply(
        _OPS[fusion],
        path,
        (len(features), len(weights)),
        loss.alpha,
        loss.mean,
        loss.ignore_index,
        loss.label_smoothing,
        encoder_leak,
        head_leak,
        workspace_limit(),
        torch.is_grad_enabled(),
        loss.target,
        *features,
        *weights,
        *biases,
        *loss.present,
    )
    fused, *unimodal = losses.unbind()
    return DecoupledLoss(total, fused, tuple(unimodal), correct)

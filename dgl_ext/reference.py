"""The definition: disentangled gradients in plain PyTorch.

Slow and short on purpose. Every other backend must agree with this module, which itself is tested
against a two-pass training recipe. It runs wherever PyTorch runs and differentiates twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._validate import check_present, check_share
from .heads import Biases, Features, Weights, get_head
from .types import DecoupledLogits

Formula = Callable[[Features, Weights, Biases, float, float], tuple[Tensor, tuple[Tensor, ...]]]


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; the gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None


def _leak(tensor: Tensor, share: float) -> Tensor:
    """Lets the given share of the gradient through: all at 1, none (not zeros) at 0."""
    if share == 0:
        return tensor.detach()
    return tensor if share == 1 else _ScaleGradient.apply(tensor, share)


def _leak_all(tensors: Biases, share: float) -> Biases:
    return tuple(None if tensor is None else _leak(tensor, share) for tensor in tensors)


def _concat(
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    (weight,), (bias,) = weights, biases
    joined = torch.cat([_leak(h, encoder_leak) for h in features], dim=-1)  # (..., sum D)
    fused = F.linear(joined, weight, bias)  # (..., C)

    (shared_bias,) = _leak_all(biases, head_leak)
    columns = _leak(weight, head_leak).split([h.shape[-1] for h in features], dim=1)
    unimodal = tuple(F.linear(h, w, shared_bias) for h, w in zip(features, columns, strict=True))
    return fused, unimodal


def _sum(
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    parts = [
        F.linear(_leak(h, encoder_leak), w, b)
        for h, w, b in zip(features, weights, biases, strict=True)
    ]
    unimodal = tuple(
        F.linear(h, _leak(w, head_leak), b)
        for h, w, b in zip(features, weights, _leak_all(biases, head_leak), strict=True)
    )
    return reduce(torch.add, parts), unimodal


def _film(
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    (x, y), (film_weight, out_weight), (film_bias, out_bias) = features, weights, biases
    hidden = y.shape[-1]
    film = F.linear(_leak(x, encoder_leak), film_weight, film_bias)  # (..., 2H)
    gamma, beta = film.chunk(2, dim=-1)  # (..., H) each
    fused = F.linear(gamma * _leak(y, encoder_leak) + beta, out_weight, out_bias)

    film_weight, out_weight = _leak(film_weight, head_leak), _leak(out_weight, head_leak)
    film_bias, out_bias = _leak_all((film_bias, out_bias), head_leak)
    if film_bias is None:
        film_bias = film_weight.new_zeros(2 * hidden)
    b_gamma, b_beta = film_bias.chunk(2)
    hidden_x = F.linear(x, film_weight[hidden:], b_beta)  # y = 0 leaves beta(x)
    hidden_y = b_gamma * y + b_beta  # x = 0 leaves the modulation's biases
    return fused, tuple(F.linear(h, out_weight, out_bias) for h in (hidden_x, hidden_y))


FORMULAS: dict[str, Formula] = {"concat": _concat, "sum": _sum, "film": _film}


def fused_decouple(
    features: Any,
    weight: Any,
    bias: Any = None,
    *,
    fusion: str = "concat",
    present: Any = None,
    encoder_leak: float = 0.0,
    head_leak: float = 0.0,
    backend: str = "auto",
) -> DecoupledLogits:
    """Computes what `dgl_ext.fused_decouple` computes, in plain PyTorch.

    Takes the same arguments, which are documented there. `backend` may be "auto" or "reference".
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f'backend: expected "auto" or "reference" here, got {backend!r}')
    tensors, weights, biases = get_head(fusion).check(features, weight, bias)
    shares = check_share("encoder_leak", encoder_leak), check_share("head_leak", head_leak)
    masks = check_present(present, tensors)
    return compute(fusion, tensors, weights, biases, *shares, masks)


def compute(
    fusion: str,
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
    present: tuple[Tensor | None, ...] | None,
) -> DecoupledLogits:
    """Applies a head's formula to arguments that were checked before."""
    if present is not None:
        # Selected, not multiplied: what an absent row stores is never read, NaN included.
        features = tuple(
            h if mask is None else torch.where(mask.unsqueeze(-1), h, 0.0)
            for h, mask in zip(features, present, strict=True)
        )
    fused, unimodal = FORMULAS[fusion](features, weights, biases, encoder_leak, head_leak)
    return DecoupledLogits(fused, unimodal)

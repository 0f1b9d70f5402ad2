"""The definition: disentangled gradients in plain PyTorch.

Slow and short on purpose. Every other backend must agree with this module, which itself is tested
against a two-pass training recipe. It runs wherever PyTorch runs and differentiates twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _torch_private
from ._arguments.cross_entropy import CrossEntropy
from ._arguments.heads import Biases, Features, Weights
from .types import DecoupledLogits, DecoupledLoss

Parameters = tuple[Weights, Biases]
Logits = tuple[Tensor, tuple[Tensor, ...]]  # fused, and one per modality
# Takes the features, and those that the fused logits are fed; the parameters whole, and cut off as
# the unimodal logits get them.
Formula = Callable[[Features, Features, Parameters, Parameters], Logits]


def _leak(tensor: Tensor, share: float) -> Tensor:
    """Lets the given share of the gradient through: all at 1, none (not zeros) at 0."""
    if share == 0:
        return tensor.detach()
    if share == 1:
        return tensor
    # A zero with the tensor's gradient, by operations that every transform of PyTorch knows, as
    # it does not know an autograd.Function. (Infinity less itself is NaN, and goes without.)
    zero = (tensor - tensor.detach()).nan_to_num()
    return tensor.detach() + share * zero


def _concat(features: Features, fed: Features, whole: Parameters, cut: Parameters) -> Logits:
    (weight,), (bias,) = whole
    fused = F.linear(torch.cat(fed, dim=-1), weight, bias)  # (..., C)

    (weight,), (bias,) = cut
    columns = weight.split([h.shape[-1] for h in features], dim=1)
    return fused, tuple(F.linear(h, w, bias) for h, w in zip(features, columns, strict=True))


def _sum(features: Features, fed: Features, whole: Parameters, cut: Parameters) -> Logits:
    parts = [F.linear(h, w, b) for h, w, b in zip(fed, *whole, strict=True)]
    unimodal = tuple(F.linear(h, w, b) for h, w, b in zip(features, *cut, strict=True))
    return reduce(torch.add, parts), unimodal


def _film(features: Features, fed: Features, whole: Parameters, cut: Parameters) -> Logits:
    (x, y), ((film_weight, out_weight), (film_bias, out_bias)) = fed, whole
    gamma, beta = F.linear(x, film_weight, film_bias).chunk(2, dim=-1)  # (..., H) each
    fused = F.linear(gamma * y + beta, out_weight, out_bias)

    (x, y), ((film_weight, out_weight), (film_bias, out_bias)) = features, cut
    hidden = y.shape[-1]
    if film_bias is None:
        film_bias = film_weight.new_zeros(2 * hidden)
    b_gamma, b_beta = film_bias.chunk(2)
    hidden_x = F.linear(x, film_weight[hidden:], b_beta)  # y = 0 leaves beta(x)
    hidden_y = b_gamma * y + b_beta  # x = 0 leaves the modulation's biases
    return fused, tuple(F.linear(h, out_weight, out_bias) for h in (hidden_x, hidden_y))


FORMULAS: dict[str, Formula] = {"concat": _concat, "sum": _sum, "film": _film}


def compute(
    fusion: str,
    features: Features,
    weights: Weights,
    biases: Biases,
    encoder_leak: float,
    head_leak: float,
    present: tuple[Tensor | None, ...],
) -> DecoupledLogits:
    """Applies a head's formula to arguments that were checked before; `present` may be empty."""
    if present:
        features = without_absent(features, present)
    fed = tuple(_leak(h, encoder_leak) for h in features)
    cut_weights = tuple(_leak(w, head_leak) for w in weights)
    cut_biases = tuple(None if b is None else _leak(b, head_leak) for b in biases)
    formula = FORMULAS[fusion]
    return DecoupledLogits(*formula(features, fed, (weights, biases), (cut_weights, cut_biases)))


def without_absent(features: Features, present: Sequence[Tensor | None]) -> Features:
    """Returns the features with zeros in absent rows."""
    # Selected, not multiplied: what an absent row stores is never read, NaN included.
    return tuple(
        h if mask is None else torch.where(extended(mask, h.dim()), h, 0.0)
        for h, mask in zip(features, present, strict=True)
    )


def extended(mask: Tensor, dimensions: int) -> Tensor:
    """Returns a mask with dimensions of one at its end, as many as it lacks."""
    index = (..., *(None,) * (dimensions - mask.dim()))
    return mask[index]


def compute_cross_entropy(
    fusion: str,
    features: Features,
    weights: Weights,
    biases: Biases,
    loss: CrossEntropy,
    encoder_leak: float,
    head_leak: float,
) -> DecoupledLoss:
    """Computes a head and its loss, with arguments that were checked before."""
    arguments = (features, weights, biases, encoder_leak, head_leak, loss.present)
    return cross_entropy(compute(fusion, *arguments), loss)


def cross_entropy(logits: DecoupledLogits, loss: CrossEntropy) -> DecoupledLoss:
    """Puts cross-entropy on a head's logits."""
    _check_values("class_weight", loss.class_weight)
    _check_values("sample_weight", loss.sample_weight)
    masks = loss.present or (None,) * len(logits.unimodal)
    branches = [
        _Branch.of(z, loss, mask)
        for z, mask in zip((logits.fused, *logits.unimodal), (None, *masks), strict=True)
    ]
    values = [branch.sum for branch in branches]
    if loss.numbers.mean:
        # No row has weight: a mean is NaN. None of those that have a modality: it costs nothing.
        empty = torch.where(branches[0].divisor == 0, torch.nan, 0.0)
        values = [
            torch.where(b.divisor == 0, empty, b.sum / torch.where(b.divisor == 0, 1, b.divisor))
            for b in branches
        ]
    total = values[0] + sum(
        alpha * value for alpha, value in zip(loss.numbers.alpha, values[1:], strict=True)
    )
    fused, *unimodal = (value.detach() for value in values)
    per_branch = zip(*(b.results for b in branches), strict=True)
    return DecoupledLoss(total, fused, tuple(unimodal), *map(torch.stack, per_branch))


def _check_values(name: str, weight: Tensor | None) -> None:
    """Raises where a weight is negative or NaN, if that can be seen without waiting."""
    if weight is None or torch.compiler.is_compiling() or type(weight) is not Tensor:
        return
    if not weight.is_cpu or _torch_private.under_transforms():
        return
    for value in weight[~((weight >= 0) & weight.isfinite())][:1].tolist():
        raise RuntimeError(f"{name}: expected finite weights, 0 or more, got {value}")


class _Branch(NamedTuple):
    """One branch's loss: summed over the rows, what a mean divides by, and detached results."""

    sum: Tensor
    divisor: Tensor
    results: tuple[Tensor, Tensor, Tensor, Tensor]  # correct, count, losses, predictions

    @classmethod
    def of(cls, logits: Tensor, loss: CrossEntropy, mask: Tensor | None) -> _Branch:
        leading, classes = logits.shape[:-1], logits.shape[-1]
        rows = logits.reshape(math.prod(leading), classes)  # no number yet where it is exported
        if rows.dtype.itemsize == 2:
            rows = rows.float()
        soft = loss.target.is_floating_point()
        ignore_index = loss.numbers.ignore_index
        if soft:
            target = loss.target.reshape(rows.shape).to(rows.dtype)
            counts = target.new_ones(rows.shape[0], dtype=torch.bool)
        else:
            target = loss.target.reshape(-1)
            counts = target != ignore_index
        if mask is not None:
            counts = counts & mask.reshape(-1)
        if not soft:  # a row without the modality is left out as one that is to be ignored
            target = target.masked_fill(~counts, ignore_index)
        losses = F.cross_entropy(
            rows,
            target,
            weight=loss.class_weight,
            reduction="none",
            ignore_index=-100 if soft else ignore_index,
            label_smoothing=loss.numbers.label_smoothing,
        )
        losses = torch.where(counts, losses, 0.0)
        weights = counts if loss.sample_weight is None else counts * loss.sample_weight.reshape(-1)
        predictions = (
            rows.argmax(dim=-1) if classes else torch.zeros_like(counts, dtype=torch.int64)
        )
        label = target.argmax(dim=-1) if soft and classes else target
        divisor = weights.sum()
        if loss.class_weight is not None and not soft:
            divisor = (weights * loss.class_weight[target.masked_fill(~counts, 0)]).sum()
        results = (
            ((predictions == label) & counts).sum(),
            counts.sum(),
            losses.detach().reshape(leading),
            predictions.reshape(leading),
        )
        return cls((weights * losses).sum(), divisor, results)

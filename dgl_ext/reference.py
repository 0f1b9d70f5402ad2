"""The definition: disentangled gradients in plain PyTorch.

Slow and short on purpose. Every other backend must agree with this module, which itself is tested
against a two-pass training recipe. It runs wherever PyTorch runs and differentiates twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments.cross_entropy import CrossEntropy
from ._arguments.heads import Biases, Features, Weights
from .types import DecoupledLogits, DecoupledLoss

Formula = Callable[[Features, Weights, Biases, float, float], tuple[Tensor, tuple[Tensor, ...]]]


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
    fused, unimodal = FORMULAS[fusion](features, weights, biases, encoder_leak, head_leak)
    return DecoupledLogits(fused, unimodal)


def without_absent(features: Features, present: Sequence[Tensor | None]) -> Features:
    """Returns the features with zeros in absent rows."""
    # Selected, not multiplied: what an absent row stores is never read, NaN included.
    return tuple(
        h if mask is None else torch.where(mask.unsqueeze(-1), h, 0.0)
        for h, mask in zip(features, present, strict=True)
    )


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
    masks = loss.present or (None,) * len(logits.unimodal)
    branches = [_branch_loss(logits.fused, loss, None)]
    branches += [
        _branch_loss(z, loss, mask) for z, mask in zip(logits.unimodal, masks, strict=True)
    ]
    losses, hits = zip(*branches, strict=True)
    shares = zip(loss.alpha, losses[1:], strict=True)
    total = losses[0] + sum(alpha * branch for alpha, branch in shares)
    fused, *unimodal = (branch.detach() for branch in losses)
    return DecoupledLoss(total, fused, tuple(unimodal), torch.stack(hits))


def _branch_loss(logits: Tensor, loss: CrossEntropy, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns one branch's loss and its top-1 hits, among the rows that count."""
    classes = logits.shape[-1]
    if logits.dtype.itemsize == 2:
        logits = logits.float()
    rows = logits.reshape(loss.target.numel(), classes)
    target = loss.target.reshape(-1)
    if mask is not None:
        # A row without the modality is left out as one whose target is to be ignored.
        target = target.masked_fill(~mask.reshape(-1), loss.ignore_index)
    counts = target != loss.ignore_index
    loss_of = partial(
        F.cross_entropy,
        rows,
        target,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
    )
    if mask is None or not loss.mean:
        value = loss_of(reduction="mean" if loss.mean else "sum")
    else:
        # A modality that no counted row has adds nothing to the total, where a mean gives NaN.
        number = counts.sum()
        lacking = (number == 0) & (loss.target != loss.ignore_index).any()
        value = loss_of(reduction="sum") / torch.where(lacking, 1, number)
    if classes == 0:
        return value, counts.new_zeros((), dtype=torch.int64)
    return value, ((rows.argmax(dim=-1) == target) & counts).sum()

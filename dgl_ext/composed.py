"""The heads from library GEMMs on views of the weight: for sizes at which those are the fastest.

A `*_head_*` function takes what the op of its name takes and returns what that returns. Against the
plain formula this saves the cat, the blocks of zeros and the products that the published recipe
throws away: for concat and sum with two modalities 6 units of work in place of 16. Sums and
intermediate logits of 16-bit dtypes are float32. On CUDA the ops come here where the plan says so.

The formulas are `*_logits` and `*_grads`, on matrices; `composed_step.py` uses them, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

OptionalTensors = Sequence[Tensor | None]


def rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D), a view where there can be one."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def select_present(feature: Tensor, mask: Tensor | None) -> Tensor:
    """The feature with zeros in absent rows: selected, so that what they store is never read."""
    return feature if mask is None else torch.where(mask.unsqueeze(-1), feature, 0)


def _present_rows(features: Sequence[Tensor], present: OptionalTensors) -> list[Tensor]:
    masks = present or (None,) * len(features)
    return [rows(select_present(h, mask)) for h, mask in zip(features, masks, strict=True)]


def clear_absent(grads: Sequence[Tensor], present: OptionalTensors, needs: Needs) -> None:
    """Sets the features' gradients, which come first, to zero in absent rows."""
    if not present:
        return
    needed = [mask for mask, need in zip(present, needs.features, strict=True) if need]
    for grad, mask in zip(grads, needed, strict=False):
        if mask is not None:
            grad.masked_fill_(~mask.unsqueeze(-1), 0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` with the sums' own dtype, so that 16-bit partial logits are not rounded twice."""
    if a.dtype.itemsize != 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _mixed(terms: Sequence[tuple[Tensor | None, float]], like: Tensor) -> Tensor:
    """Returns the sum of `scale * grad` over those that are there, in the dtype of `like`.

    What has no share is not read, so that its NaN goes nowhere.
    """
    there = [(grad, scale) for grad, scale in terms if grad is not None and scale != 0]
    if not there:
        return torch.zeros_like(like)
    (first, share), *others = there
    if not others and share == 1:
        return first
    result = first.to(accumulator(first.dtype), copy=True)
    if share != 1:
        result *= share
    for grad, scale in others:
        result.add_(grad, alpha=scale)
    return result.to(like.dtype)


class Branches(NamedTuple):
    """The gradients of all branches' logits, fused first, as matrices (rows, C).

    Attributes:
        grads: in the dtype of the features; None where no gradient comes.
        weights: None, or what the gradients were multiplied by, as 0-dim tensors, in which case
            they are in the accumulator's dtype. Mixtures of 16-bit problems are divided by their
            largest weight before they are rounded, so that they do not underflow however many rows
            a mean divides by, and products are multiplied by it after.
    """

    grads: OptionalTensors
    weights: Sequence[Tensor] | None = None

    def unit(self, shares: Sequence[float], dtype: torch.dtype) -> Tensor | None:
        """What a mixture with these shares is divided by while it is 16 bits wide, if anything."""
        if self.weights is None or dtype.itemsize != 2:
            return None
        there = [
            weight.abs() * share
            for weight, share in zip(self.weights, shares, strict=True)
            if share != 0
        ]
        largest = reduce(torch.maximum, there)
        return torch.where(largest == 0, 1, largest)

    def mix(self, shares: Sequence[float], like: Tensor) -> Tensor:
        """The sum of the gradients times their shares."""
        return _mixed(list(zip(self.grads, shares, strict=True)), like)


def _put(
    out: Tensor, a: Tensor, b: Tensor, unit: Tensor | None, add: bool, scale: float = 1.0
) -> None:
    """Writes `scale a b` to `out`, or adds it; `a` is narrowed to the dtype of `b` by `unit`."""
    if unit is None and out.dtype == b.dtype:
        torch.addmm(out, a.to(b.dtype), b, beta=int(add), alpha=scale, out=out)
        return
    product = _unit_product(a, b, unit)
    if scale != 1:
        product *= scale
    if add:
        out += product
    else:
        out.copy_(product)


def _unit_product(a: Tensor, b: Tensor, unit: Tensor | None) -> Tensor:
    """`a b` in the accumulator's dtype, `a` being as wide as `b` on the way."""
    if unit is None:
        return _product(a.to(b.dtype), b)
    narrow = torch.empty_like(a, dtype=b.dtype)
    torch.div(a, unit, out=narrow)
    return _product(narrow, b).mul_(unit)


def _put_sums(out: Tensor, grad: Tensor, add: bool) -> None:
    sums = grad.sum(0, dtype=accumulator(grad.dtype))
    if add:
        out += sums
    else:
        out.copy_(sums)


def _grad_rows(
    grad_outputs: OptionalTensors, feature: Tensor, weight: Tensor
) -> tuple[Branches, Tensor]:
    """The gradients as matrices, and one to take shape and dtype from (zeros if none is there)."""
    grads = [None if grad is None else rows(grad) for grad in grad_outputs]
    there = [grad for grad in grads if grad is not None]
    count = math.prod(feature.shape[:-1])
    return Branches(grads), there[0] if there else feature.new_zeros((count, weight.shape[0]))


class Needs(NamedTuple):
    """Which gradients are asked for; results come in this order."""

    features: Sequence[bool]
    weights: Sequence[bool]
    biases: Sequence[bool]

    def some(self) -> bool:
        """Whether there is any."""
        return any((*self.features, *self.weights, *self.biases))


def _linear_columns(features: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each modality's (C, D_i): columns of the weight they share, or a weight of its own."""
    if len(weights) > 1:
        return weights
    columns: tuple[Tensor, ...] = weights[0].split([h.shape[-1] for h in features], dim=1)
    return columns


def linear_logits(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> list[Tensor]:
    """The logits of concat and sum from matrices, fused first, in the accumulator's dtype."""
    unimodal = [
        _product(h, w.t())
        for h, w in zip(features, _linear_columns(features, weights), strict=True)
    ]
    fused = unimodal[0].clone() if len(unimodal) == 1 else unimodal[0] + unimodal[1]
    for term in (*unimodal[2:], *biases):
        if term is not None:
            fused += term
    own = biases if len(weights) > 1 else [biases[0]] * len(features)
    for z, bias in zip(unimodal, own, strict=True):
        if bias is not None:
            z += bias
    return [fused, *unimodal]


def linear_head_forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    present: OptionalTensors,
) -> list[Tensor]:
    """The logits of concat and sum, fused first."""
    like = features[0]
    shape = (*like.shape[:-1], weights[0].shape[0])
    logits = linear_logits(_present_rows(features, present), weights, biases)
    return [z.to(like.dtype).view(shape) for z in logits]


def linear_grads(
    branches: Branches,
    like: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs: Needs,
    encoder_leak: float,
    head_leak: float,
    results: Sequence[Tensor],
    add: bool,
) -> None:
    """The gradients of concat and sum that are needed, from and to matrices.

    Gradients of features are written, those of parameters are added where `add`. `like` has the
    shape and dtype of the branches' gradients.
    """
    result = iter(results)
    columns = _linear_columns(features, weights)
    dtype = features[0].dtype
    modalities = range(len(features))
    for i in modalities:
        if needs.features[i]:
            shares = (encoder_leak, *[float(i == k) for k in modalities])
            unit = branches.unit(shares, dtype)
            _put(next(result), branches.mix(shares, like), columns[i], unit, False)

    shared = len(weights) == 1

    def to_head(*alone: int) -> tuple[float, ...]:
        return 1.0, *[head_leak * (k in alone) for k in modalities]

    for w in range(len(weights)):
        if not needs.weights[w]:
            continue
        out = next(result)
        taking = modalities if shared else (w,)
        parts = _linear_columns(features, [out]) if shared else [out]
        for i, part in zip(taking, parts, strict=True):
            unit = branches.unit(to_head(i), dtype)
            _put(part, branches.mix(to_head(i), like).t(), features[i], unit, add)
    for b in range(len(weights)):
        if needs.biases[b]:
            taking = modalities if shared else (b,)
            _put_sums(next(result), branches.mix(to_head(*taking), like), add)


def linear_head_backward(
    grad_outputs: OptionalTensors,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    present: OptionalTensors,
    needs_features: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
    encoder_leak: float,
    head_leak: float,
) -> list[Tensor]:
    """The gradients of concat and sum that are needed: features, weights, biases."""
    branches, like = _grad_rows(grad_outputs, features[0], weights[0])
    needs = Needs(needs_features, needs_weights, needs_biases)
    results = empty_grads(features, weights, needs)
    matrices = _present_rows(features, present)
    outs = _as_matrices(results, needs)
    linear_grads(branches, like, matrices, weights, needs, encoder_leak, head_leak, outs, False)
    clear_absent(results, present, needs)
    return results


def empty_grads(
    features: Sequence[Tensor], weights: Sequence[Tensor], needs: Needs
) -> list[Tensor]:
    """Contiguous tensors for the gradients that are needed."""
    like = features[0]
    shapes = [h.shape for h, need in zip(features, needs.features, strict=True) if need]
    shapes += [w.shape for w, need in zip(weights, needs.weights, strict=True) if need]
    shapes += [w.shape[:1] for w, need in zip(weights, needs.biases, strict=True) if need]
    return [like.new_empty(shape) for shape in shapes]


def _as_matrices(results: Sequence[Tensor], needs: Needs) -> list[Tensor]:
    """The gradients with those of features, which come first, as matrices."""
    count = sum(map(bool, needs.features))
    return [*map(rows, results[:count]), *results[count:]]


def film_logits(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> tuple[list[Tensor], Tensor, Tensor]:
    """FiLM's logits from matrices (fused, of x, of y), [gamma | beta], and the hidden rows.

    All but the hidden rows in the accumulator's dtype.
    """
    x, y = features
    film = _product(x, weights[0].t())
    if biases[0] is not None:
        film += biases[0]
    hidden = _film_hidden(film, y, biases[0])
    logits = _product(hidden.flatten(0, 1), weights[1].t())
    if biases[1] is not None:
        logits += biases[1]
    return list(logits.view(3, len(y), len(weights[1])).unbind()), film, hidden


def film_head_forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    present: OptionalTensors,
) -> list[Tensor]:
    """The logits of FiLM (fused, of x, of y) and the modulation [gamma | beta]."""
    leading = features[0].shape[:-1]
    logits, film, _ = film_logits(_present_rows(features, present), weights, biases)
    shape = (*leading, len(weights[1]))
    dtype = features[0].dtype
    return [
        *[z.to(dtype, copy=True).view(shape) for z in logits],
        film.view(*leading, film.shape[1]),
    ]


def _film_hidden(film: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """What the output layer reads, of the fused branch, x alone and y alone: (3, rows, H)."""
    gamma, beta = film.chunk(2, dim=1)
    hidden = y.new_empty((3, *y.shape))
    hidden[0] = gamma * y + beta
    hidden[1] = beta
    if bias is None:
        hidden[2] = 0
    else:
        b_gamma, b_beta = bias.to(film.dtype).chunk(2)
        hidden[2] = b_gamma * y + b_beta
    return hidden


# The shares of each branch by itself.
_ALONE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def film_grads(
    branches: Branches,
    like: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    film: Tensor,
    hidden: Tensor | None,
    needs: Needs,
    encoder_leak: float,
    head_leak: float,
    results: Sequence[Tensor],
    add: bool,
) -> None:
    """The gradients of FiLM that are needed, from and to matrices, as `linear_grads` has it.

    `hidden` are the hidden rows; where they are not at hand, they are made again.
    """
    result = iter(results)
    x, y = features
    film_weight, out_weight = weights
    dtype = x.dtype

    # d is the gradient of the hidden rows: of the fused branch, x alone, y alone.
    d, d_x, d_y = (
        None if grad is None else _unit_product(grad, out_weight, branches.unit(share, dtype))
        for grad, share in zip(branches.grads, _ALONE, strict=True)
    )
    d_gamma = None if d is None else d * y
    gamma = film[:, : y.shape[1]]

    def to_film(fused: float, of_x: float) -> tuple[Tensor, Tensor | None]:
        halves = _mixed([(d_gamma, fused)], gamma), _mixed([(d, fused), (d_x, of_x)], gamma)
        return torch.cat(halves, 1), branches.unit((fused, of_x, 0.0), dtype)

    if needs.features[0]:
        grad, unit = to_film(encoder_leak, 1.0)
        _put(next(result), grad, film_weight, unit, False)
    if needs.features[1]:
        through_gamma = None if d is None else gamma * d
        by_bias = None if d_y is None or biases[0] is None else biases[0][: y.shape[1]] * d_y
        next(result).copy_(_mixed([(through_gamma, encoder_leak), (by_bias, 1)], gamma))
    if needs.weights[0]:
        grad, unit = to_film(1.0, head_leak)
        _put(next(result), grad.t(), x, unit, add)
    if needs.weights[1]:
        if hidden is None:
            hidden = _film_hidden(film, y, biases[0])
        out = next(result)
        if not add:
            out.zero_()
        scales = (1.0, head_leak, head_leak)
        terms = zip(branches.grads, hidden, scales, _ALONE, strict=True)
        for logits_grad, branch, scale, share in terms:
            if logits_grad is not None and scale != 0:
                _put(out, logits_grad.t(), branch, branches.unit(share, dtype), True, scale)
    if needs.biases[0]:
        to_gamma, to_beta = next(result).chunk(2)
        by_y = None if d_y is None else d_y * y
        _put_sums(to_gamma, _mixed([(d_gamma, 1), (by_y, head_leak)], gamma), add)
        _put_sums(to_beta, _mixed([(d, 1), (d_x, head_leak), (d_y, head_leak)], gamma), add)
    if needs.biases[1]:
        _put_sums(next(result), branches.mix((1.0, head_leak, head_leak), like), add)


def film_head_backward(
    grad_outputs: OptionalTensors,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    film: Tensor,
    present: OptionalTensors,
    needs_features: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
    encoder_leak: float,
    head_leak: float,
) -> list[Tensor]:
    """The gradients of FiLM that are needed: features, weights, biases."""
    branches, like = _grad_rows(grad_outputs, features[0], weights[1])
    needs = Needs(needs_features, needs_weights, needs_biases)
    x, y = _present_rows(features, present)
    film = rows(film)
    results = empty_grads(features, weights, needs)
    outs = _as_matrices(results, needs)
    wide = sum(map(bool, (*needs.features, needs.weights[0])))
    if needs.weights[1]:  # a sum over branches
        outs[wide] = outs[wide].to(accumulator(outs[wide].dtype))
    film_grads(branches, like, (x, y), weights, biases, film, None, needs, encoder_leak,
               head_leak, outs, False)  # fmt: skip
    if needs.weights[1]:
        results[wide] = outs[wide].to(results[wide].dtype)
    clear_absent(results, present, needs)
    return results

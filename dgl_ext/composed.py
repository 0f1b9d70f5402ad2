"""The heads from library GEMMs on views of the weight: for sizes at which those are the fastest.

Each function takes what the op of its name takes and returns what that returns. Against the plain
formula this saves the cat, the blocks of zeros and the products that the published recipe throws
away: for concat and sum with two modalities 6 units of work in place of 16. Sums and intermediate
logits of 16-bit dtypes are float32. On CUDA the ops come here where the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

OptionalTensors = Sequence[Tensor | None]


def _rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D), a view where there can be one."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` with the sums' own dtype, so that 16-bit partial logits are not rounded twice."""
    if a.dtype.itemsize != 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _mixed(terms: Sequence[tuple[Tensor | None, float]], like: Tensor) -> Tensor:
    """Returns the sum of `scale * grad` over those that are there, in the dtype of `like`."""
    there = [(grad, scale) for grad, scale in terms if grad is not None and scale != 0]
    if not there:
        return torch.zeros_like(like)
    if len(there) == 1 and there[0][1] == 1:
        return there[0][0]
    scaled = [grad.to(_accumulator(grad.dtype)) * scale for grad, scale in there]
    return reduce(torch.add, scaled).to(like.dtype)


def _grad_rows(
    grad_outputs: OptionalTensors, feature: Tensor, weight: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients as matrices, and one to take shape and dtype from (zeros if none is there)."""
    grads = [None if grad is None else _rows(grad) for grad in grad_outputs]
    there = [grad for grad in grads if grad is not None]
    rows = math.prod(feature.shape[:-1])
    return grads, there[0] if there else feature.new_zeros((rows, weight.shape[0]))


def _column_sums(grad: Tensor) -> Tensor:
    return grad.sum(0, dtype=_accumulator(grad.dtype)).to(grad.dtype)


def _linear_columns(features: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each modality's (C, D_i): columns of the weight they share, or a weight of its own."""
    if len(weights) > 1:
        return weights
    columns: tuple[Tensor, ...] = weights[0].split([h.shape[-1] for h in features], dim=1)
    return columns


def linear_head_forward(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> list[Tensor]:
    """The logits of concat and sum, fused first."""
    like = features[0]
    shape = (*like.shape[:-1], weights[0].shape[0])
    partials = [
        _product(_rows(h), w.t())
        for h, w in zip(features, _linear_columns(features, weights), strict=True)
    ]
    own = biases if len(weights) > 1 else [biases[0]] * len(features)
    terms = [*partials, *[bias for bias in biases if bias is not None]]
    fused = reduce(torch.add, terms) if len(terms) > 1 else terms[0].clone()
    unimodal = [z if bias is None else z + bias for z, bias in zip(partials, own, strict=True)]
    return [z.to(like.dtype).view(shape) for z in (fused, *unimodal)]


def linear_head_backward(
    grad_outputs: OptionalTensors,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs_features: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
    encoder_leak: float,
    head_leak: float,
) -> list[Tensor]:
    """The gradients of concat and sum that are needed: features, weights, biases."""
    (fused, *unimodal), like = _grad_rows(grad_outputs, features[0], weights[0])
    columns = _linear_columns(features, weights)
    results = []
    for i, (feature, column) in enumerate(zip(features, columns, strict=True)):
        if needs_features[i]:
            grad = _mixed([(unimodal[i], 1), (fused, encoder_leak)], like)
            results.append((grad @ column).view(feature.shape))

    def to_head(branches: Sequence[Tensor | None]) -> Tensor:
        return _mixed([(fused, 1), *[(grad, head_leak) for grad in branches]], like)

    shared = len(weights) == 1
    for w, weight in enumerate(weights):
        if not needs_weights[w]:
            continue
        result = weight.new_empty(weight.shape)
        modalities = range(len(features)) if shared else (w,)
        for i, part in zip(
            modalities, _linear_columns(features, [result]) if shared else [result], strict=True
        ):
            torch.mm(to_head([unimodal[i]]).t(), _rows(features[i]), out=part)
        results.append(result)
    for b in range(len(weights)):
        if needs_biases[b]:
            results.append(_column_sums(to_head(unimodal if shared else [unimodal[b]])))
    return results


def film_head_forward(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> list[Tensor]:
    """The logits of FiLM (fused, of x, of y) and the modulation [gamma | beta]."""
    x, y = map(_rows, features)
    leading = features[0].shape[:-1]
    film = _product(x, weights[0].t())
    if biases[0] is not None:
        film = film + biases[0]
    hidden = _film_hidden(film, y, biases[0])  # (3, rows, H)
    logits = _product(hidden.flatten(0, 1), weights[1].t())
    if biases[1] is not None:
        logits = logits + biases[1]
    stacked = logits.to(y.dtype).view(3, *leading, weights[1].shape[0])
    return [*[z.clone() for z in stacked], film.view(*leading, film.shape[1])]


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


def film_head_backward(
    grad_outputs: OptionalTensors,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    film: Tensor,
    needs_features: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
    encoder_leak: float,
    head_leak: float,
) -> list[Tensor]:
    """The gradients of FiLM that are needed: features, weights, biases."""
    grads, like = _grad_rows(grad_outputs, features[0], weights[1])
    x, y = map(_rows, features)
    film_weight, out_weight = weights
    film, hidden = _rows(film), y.shape[1]

    # d is the gradient of the hidden rows: of the fused branch, x alone, y alone.
    d, d_x, d_y = (None if grad is None else _product(grad, out_weight) for grad in grads)

    def total(*terms: tuple[Tensor | None, float]) -> Tensor:
        """Sums (rows, H) terms; what has no share is not read, so that its NaN goes nowhere."""
        there = [term if scale == 1 else term * scale for term, scale in terms
                 if term is not None and scale != 0]  # fmt: skip
        return reduce(torch.add, there) if there else film.new_zeros(y.shape)

    d_gamma = None if d is None else d * y
    results = []
    if needs_features[0]:
        to_x = torch.cat([total((d_gamma, encoder_leak)), total((d, encoder_leak), (d_x, 1))], 1)
        results.append((to_x.to(x.dtype) @ film_weight).view(features[0].shape))
    if needs_features[1]:
        through_gamma = None if d is None else film[:, :hidden] * d
        alone = None if d_y is None or biases[0] is None else biases[0][:hidden] * d_y
        to_y = total((through_gamma, encoder_leak), (alone, 1))
        results.append(to_y.to(y.dtype).view(features[1].shape))
    if needs_weights[0]:
        to_film = torch.cat([total((d_gamma, 1)), total((d, 1), (d_x, head_leak))], 1)
        results.append(to_film.to(x.dtype).t() @ x)
    if needs_weights[1]:
        scales = (1.0, head_leak, head_leak)
        branches = _film_hidden(film, y, biases[0])
        terms = [
            scale * _product(grad.t(), branch)
            for grad, branch, scale in zip(grads, branches, scales, strict=True)
            if grad is not None and scale != 0
        ]
        grad_weight = reduce(torch.add, terms) if terms else torch.zeros_like(out_weight)
        results.append(grad_weight.to(out_weight.dtype))
    if needs_biases[0]:
        alone = None if d_y is None else d_y * y
        to_gamma = total((d_gamma, 1), (alone, head_leak)).sum(0)
        to_beta = total((d, 1), (d_x, head_leak), (d_y, head_leak)).sum(0)
        results.append(torch.cat([to_gamma, to_beta]).to(like.dtype))
    if needs_biases[1]:
        shares = [(grads[0], 1.0), (grads[1], head_leak), (grads[2], head_leak)]
        results.append(_column_sums(_mixed(shares, like)))
    return results

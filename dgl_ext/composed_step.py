"""The training step from library GEMMs: logits, cross-entropy of every branch, all gradients.

It goes by chunks of rows, so that logits and their gradients, which take each other's place, stay
within the workspace limit. Nothing is read back from a CUDA device: how many rows count stays a
tensor there, and the chunks follow from sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._validate import check_present, check_target
from .composed import (
    Branches,
    Needs,
    OptionalTensors,
    accumulator,
    clear_absent,
    empty_grads,
    film_grads,
    film_logits,
    linear_grads,
    linear_logits,
    rows,
    select_present,
)

# From features (matrices), weights and biases to the logits, fused first, and to what makes
# gradients of theirs: `linear_grads` or `film_grads`, short of all arguments from `needs` on.
_Head = Callable[
    [Sequence[Tensor], Sequence[Tensor], OptionalTensors],
    tuple[list[Tensor], Callable[..., None]],
]


class _Targets(NamedTuple):
    """The classes to be found, and in which rows: all by rows, of the batch or of a chunk.

    Attributes:
        classes: 0 in place of `ignore_index`.
        counted: per branch the rows that count in its loss, fused first.
        present: per modality the rows that have it, None where all do.
    """

    classes: Tensor
    counted: list[Tensor]
    present: OptionalTensors

    @classmethod
    def check(
        cls, op: str, target: Tensor, present: OptionalTensors, classes: int, ignore_index: int
    ) -> _Targets:
        """Reads target and masks; a target out of range is an error on the CPU."""
        target = target.reshape(-1)
        masks = [None if mask is None else mask.reshape(-1) for mask in present]
        counted = target != ignore_index
        if target.device.type == "cpu":  # a device asserts where it reads
            wrong = counted & ((target < 0) | (target >= classes))
            if wrong.any():
                raise RuntimeError(
                    f"dgl_ext::{op}: target: expected class indices in [0, {classes}) or "
                    f"ignore_index {ignore_index}, got {target[wrong][0].item()}"
                )
        return cls(
            target.masked_fill(~counted, 0),
            [counted, *(counted if mask is None else counted & mask for mask in masks)],
            masks,
        )

    def chunk(self, part: slice) -> _Targets:
        return _Targets(
            self.classes[part],
            [counted[part] for counted in self.counted],
            [None if mask is None else mask[part] for mask in self.present],
        )


def linear_head_step(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors, *options: Any
) -> list[Tensor]:
    """The training step of concat and sum."""
    return _step("linear_head_step_composed", _linear, features, weights, biases, *options)


def film_head_step(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors, *options: Any
) -> list[Tensor]:
    """The training step of FiLM."""
    return _step("film_head_step_composed", _film, features, weights, biases, *options)


def _linear(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> tuple[list[Tensor], Callable[..., None]]:
    logits = linear_logits(features, weights, biases)
    return logits, partial(linear_grads, features=features, weights=weights)


def _film(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: OptionalTensors
) -> tuple[list[Tensor], Callable[..., None]]:
    logits, film, hidden = film_logits(features, weights, biases)
    return logits, partial(
        film_grads, features=features, weights=weights, biases=biases, film=film, hidden=hidden
    )


def _step(
    op: str,
    head: _Head,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    target: Tensor,
    present: OptionalTensors,
    alpha: Sequence[float],
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
    needs_features: Sequence[bool],
    needs_weights: Sequence[bool],
    needs_biases: Sequence[bool],
    encoder_leak: float,
    head_leak: float,
    workspace_limit: int,
) -> list[Tensor]:
    """What the ops of this name return: total, losses, hits, then the gradients needed."""
    like = features[0]
    dtype = accumulator(like.dtype)
    needs = Needs(needs_features, needs_weights, needs_biases)
    classes = weights[-1].shape[0]
    masks = check_present(present or None, features) or (None,) * len(features)
    targets = _Targets.check(op, check_target(target, like), masks, classes, ignore_index)

    numbers = torch.stack([counted.sum() for counted in targets.counted])
    inverse = 1 / numbers.clamp(min=1).to(dtype) if mean else torch.ones_like(numbers, dtype=dtype)
    shares = [one * share for one, share in zip(inverse.unbind(), (1.0, *alpha), strict=True)]

    # Float32 for float16, too: the caller's scale comes before they are rounded.
    result_dtype = dtype if like.dtype == torch.float16 else like.dtype
    results = empty_grads(features, weights, needs)
    encoders = sum(map(bool, needs.features))
    of_features = [rows(result.to(result_dtype)) for result in results[:encoders]]
    of_parameters = [result.to(dtype).zero_() for result in results[encoders:]]

    matrices = [rows(h) for h in features]
    count = len(matrices[0])
    losses = like.new_zeros((len(numbers), count), dtype=dtype)
    hits = torch.zeros_like(losses, dtype=torch.bool)
    step = _rows_at_a_time(like, len(numbers), classes, needs, (encoder_leak, head_leak),
                           workspace_limit)  # fmt: skip
    for start in range(0, count, step):
        part = slice(start, start + step)
        # All that is as large as the limit allows is gone when this returns.
        losses[:, part], hits[:, part] = _chunk(
            head,
            [h[part] for h in matrices],
            weights,
            biases,
            targets.chunk(part),
            shares,
            label_smoothing,
            needs,
            encoder_leak,
            head_leak,
            [*[result[part] for result in of_features], *of_parameters],
        )
    clear_absent(of_features, targets.present, needs)
    parts = losses.sum(1)
    if mean:
        # A modality that no counted row has adds nothing, where a mean of no row at all is NaN.
        parts /= torch.where((numbers == 0) & (numbers[0] > 0), 1, numbers)
    total = parts[0].clone()
    for i, share in enumerate(alpha):
        total += share * parts[i + 1]
    return [
        total,
        parts,
        hits.sum(1),
        *(grad.view(like.shape) for grad, like in zip(of_features, results, strict=False)),
        *(grad.to(result_dtype) for grad in of_parameters),
    ]


def _chunk(
    head: _Head,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: OptionalTensors,
    targets: _Targets,
    shares: Sequence[Tensor],
    label_smoothing: float,
    needs: Needs,
    encoder_leak: float,
    head_leak: float,
    results: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of some rows, adds those of parameters; returns losses and hits."""
    features = [select_present(h, mask) for h, mask in zip(features, targets.present, strict=True)]
    logits, grads = head(features, weights, biases)
    found = [
        _cross_entropy_(z, targets.classes, counted, share, label_smoothing)
        for z, counted, share in zip(logits, targets.counted, shares, strict=True)
    ]
    if needs.some():
        grads(
            Branches(logits, shares),
            logits[0],
            needs=needs,
            encoder_leak=encoder_leak,
            head_leak=head_leak,
            results=results,
            add=True,
        )
    losses, hits = zip(*found, strict=True)
    return torch.stack(losses), torch.stack(hits)


def _rows_at_a_time(
    like: Tensor,
    branches: int,
    classes: int,
    needs: Needs,
    leaks: Sequence[float],
    workspace_limit: int,
) -> int:
    """How many rows may have logits, gradients of logits, and what products make of those."""
    width = accumulator(like.dtype).itemsize
    size = branches * width
    if needs.some():
        if any(leaks):
            size += width  # one mixture
        if like.dtype.itemsize == 2:
            size += 2 if like.is_cuda else 2 + width  # narrow; the CPU's products widen it again
    return max(workspace_limit // max(size * classes, 1), 1)


def _cross_entropy_(
    logits: Tensor, target: Tensor, counted: Tensor, share: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Returns the rows' losses and hits; leaves the gradients times `share` in `logits`."""
    classes = logits.shape[1]
    if classes == 0:  # then no row counts
        return logits.sum(1), counted
    index, each = target.unsqueeze(1), label_smoothing / classes
    top, first = logits.max(1, keepdim=True)
    z = logits.sub_(top)
    loss = (1 - label_smoothing) * z.gather(1, index)
    if each:  # without, no class of logit -inf may make a NaN
        loss += each * z.sum(1, keepdim=True)
    norm = z.exp_().sum(1, keepdim=True)
    loss = norm.log() - loss
    weight = share * counted.unsqueeze(1)
    z *= weight / norm
    if each:
        z -= each * weight
    z.scatter_(1, index, z.gather(1, index) - (1 - label_smoothing) * weight)
    hits = (first == index).squeeze(1) & counted
    return torch.where(counted, loss.squeeze(1), 0), hits

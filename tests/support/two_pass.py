"""The training recipe that the method replaces, as ground truth, and for benchmarks to time.

Two backward passes through a plain head: first the unimodal losses, each with the other modalities
absent, then the head's gradients are thrown away, and the multimodal loss trains the head on
detached features. Written from the method's description.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from support.problems import Problem, flat
from torch import Tensor

from dgl_ext.types import DecoupledLogits


def _concat(features: Any, weights: Any, biases: Any) -> Tensor:
    return F.linear(torch.cat(list(features), dim=-1), weights[0], biases[0])


def _sum(features: Any, weights: Any, biases: Any) -> Tensor:
    parts = [F.linear(h, w, b) for h, w, b in zip(features, weights, biases, strict=True)]
    return reduce(torch.add, parts)


def _film(features: Any, weights: Any, biases: Any) -> Tensor:
    x, y = features
    gamma, beta = F.linear(x, weights[0], biases[0]).chunk(2, dim=-1)
    return F.linear(gamma * y + beta, weights[1], biases[1])


PLAIN_HEADS = {"concat": _concat, "sum": _sum, "film": _film}


def plain_head(problem: Problem, features: Sequence[Tensor]) -> Tensor:
    """The head as one would write it without the method."""
    return PLAIN_HEADS[problem.fusion](features, problem.weights, problem.biases)


def plain_unimodal(problem: Problem, i: int) -> Tensor:
    """The head with all modalities but one absent: zero-filled, or for sum left out of the sum."""
    features = problem.features
    if problem.fusion == "sum":
        return F.linear(features[i], problem.weights[i], problem.biases[i])
    zero_filled = [h if i == j else torch.zeros_like(h) for j, h in enumerate(features)]
    return plain_head(problem, zero_filled)


def two_pass_loss(
    problem: Problem,
    target: Tensor,
    *,
    alpha: Sequence[float],
    upstream: float | None = 1.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    present: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The recipe with cross-entropy on every branch: the parts by name, and every `.grad`.

    `options` are those of `torch.nn.functional.cross_entropy`; every loss is scaled by `upstream`,
    as a gradient scaler does, or takes no part in a backward pass where that is None. Features of
    rows that are not `present` must be zero.
    """
    options["weight"] = class_weight
    soft = target.is_floating_point()

    def loss_of(logits: Tensor, mask: Tensor | None) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        labels = target.reshape(rows.shape) if soft else target.reshape(-1)
        if mask is None and sample_weight is None:
            return F.cross_entropy(rows, labels, **options)
        there = slice(None) if mask is None else mask.reshape(-1)
        rows, labels = rows[there], labels[there]
        each = F.cross_entropy(rows, labels, **{**options, "reduction": "none"})
        weights = torch.ones_like(each)
        if sample_weight is not None:
            weights = sample_weight.reshape(-1)[there]
        total = (weights * each).sum()
        if options.get("reduction") == "sum":
            return total
        if not soft:
            counts = labels != options.get("ignore_index", -100)
            weights, labels = weights[counts], labels[counts]
            if class_weight is not None:
                weights = weights * class_weight[labels]
        return total / weights.sum()

    def losses(logits: DecoupledLogits) -> list[Tensor]:
        masks = (None, *(present or [None] * len(logits.unimodal)))
        return [loss_of(z, mask) for z, mask in zip(flat(logits), masks, strict=True)]

    logits, _ = two_pass(problem)
    fused, *unimodal = losses(logits)
    total = fused + sum(a * loss for a, loss in zip(alpha, unimodal, strict=True))
    parts = named_loss(total, fused, unimodal)
    if upstream is None:
        return parts, {}
    torch.autograd.backward(
        [loss * (a * upstream) for a, loss in zip(alpha, unimodal, strict=True)], retain_graph=True
    )
    for parameter in (*problem.weights, *problem.biases):
        if parameter is not None:
            parameter.grad = None
    (fused * upstream).backward()
    return parts, {name: tensor.grad for name, tensor in problem.named()}


def named_loss(
    total: Tensor, fused: Tensor, unimodal: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """The total and its parts by name, for the comparisons of `support.problems`."""
    parts = {f"unimodal[{i}]": loss for i, loss in enumerate(unimodal)}
    return {"total": total, "fused": fused, **parts}


def two_pass(
    problem: Problem, cotangents: Sequence[Tensor] | None = None
) -> tuple[DecoupledLogits, dict[str, Tensor]]:
    """Returns the logits and, if there are cotangents, what the recipe leaves in every `.grad`."""
    features = problem.features
    for _, tensor in problem.named():
        tensor.grad = None
    unimodal = [plain_unimodal(problem, i) for i in range(len(features))]
    fused = plain_head(problem, [h.detach() for h in features])
    logits = DecoupledLogits(fused, tuple(unimodal))
    if cotangents is None:
        return logits, {}
    torch.autograd.backward(unimodal, cotangents[1:], retain_graph=True)
    for parameter in (*problem.weights, *problem.biases):
        if parameter is not None:
            parameter.grad = None
    fused.backward(cotangents[0])
    return logits, {name: tensor.grad for name, tensor in problem.named()}


def named_logits(logits: DecoupledLogits) -> dict[str, Tensor | None]:
    """Logits by name, for the comparisons of `support.problems`."""
    names = ["fused", *(f"unimodal[{i}]" for i in range(len(logits.unimodal)))]
    return dict(zip(names, flat(logits), strict=True))

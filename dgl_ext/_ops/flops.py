"""What torch.utils.flop_counter counts for the ops: their matrix products, two flop a term."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .library import arguments_of

# Takes an op's arguments, with shapes in the place of tensors, and which passes it makes.
Terms = Callable[[SimpleNamespace, bool, bool], int]


def _needed(sizes: Iterable[int], needs: Iterable[bool]) -> int:
    return sum(size for size, needed in zip(sizes, needs, strict=True) if needed)


def _linear_terms(call: SimpleNamespace, forward: bool, backward: bool) -> int:
    widths = [feature[-1] for feature in call.features]
    columns = sum(widths) if forward else 0
    if backward:
        columns += _needed(widths, call.needs_features)
        columns += _needed([weight[1] for weight in call.weights], call.needs_weights)
    rows: int = math.prod(call.features[0][:-1])
    classes: int = call.weights[0][0]
    return rows * classes * columns


def _film_terms(call: SimpleNamespace, forward: bool, backward: bool) -> int:
    rows = math.prod(call.features[0][:-1])
    (channels, condition), (classes, hidden) = call.weights
    modulation, out = rows * channels * condition, rows * classes * hidden
    terms = modulation + 3 * out if forward else 0
    if backward:
        of_x, of_y = call.needs_features
        of_film = call.needs_weights[0] or call.needs_biases[0]
        through_all = call.encoder_leak > 0
        # through the output layer of each branch that is differentiated, and its own gradient
        fused = of_film or ((of_x or of_y) and through_all)
        terms += (fused + of_x + of_y + call.needs_weights[1]) * out
        terms += call.needs_weights[0] * modulation
        terms += of_x * (modulation if through_all else modulation // 2)  # beta alone
    return terms


def _register(name: str, terms: Terms, forward: bool, backward: bool) -> None:
    def count(*args: Any, **_: Any) -> int:
        return 2 * terms(arguments_of(name, args), forward, backward)

    register_flop_formula(getattr(torch.ops.dgl_ext, name))(count)


def register() -> None:
    """Tells PyTorch how many flop the ops of each head take."""
    for head, terms in (("linear_head", _linear_terms), ("film_head", _film_terms)):
        _register(f"{head}_forward", terms, forward=True, backward=False)
        _register(f"{head}_backward", terms, forward=False, backward=True)
        _register(f"{head}_step", terms, forward=True, backward=True)

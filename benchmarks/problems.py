"""The problem of the benchmarks: a fusion head on two modalities, and the least work of a step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support import problems as drawn
from support.two_pass import PLAIN_HEADS, plain_head, plain_unimodal

__all__ = ["FUSIONS", "Problem", "least_work", "make_problem", "plain_head", "plain_unimodal"]

FUSIONS = tuple(PLAIN_HEADS)


@dataclass
class Problem(drawn.Problem):
    """Leaf tensors of one head and one batch, as the tests draw them, and the targets."""

    target: Tensor  # (B,)

    def head(self) -> tuple[Tensor, ...]:
        """The head's parameters."""
        return (*self.weights, *(bias for bias in self.biases if bias is not None))

    def leaves(self) -> dict[str, Tensor]:
        """Everything that receives a gradient, by name."""
        return dict(self.named())

    def as_float64(self) -> Problem:
        """The same values as leaves in float64."""
        return Problem(**vars(self.to(torch.float64)), target=self.target)


def make_problem(
    fusion: str, rows: int, width: int, classes: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Draw a head on two modalities: B = `rows`, widths D = `width`, C = `classes`."""
    problem = drawn.make_problem(
        fusion, leading=(rows,), widths=(width, width), classes=classes, dtype=dtype
    ).to(device)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    return Problem(**vars(problem), target=target.to(device))


def least_work(
    fusion: str,
    rows: int,
    width: int,
    classes: int,
    itemsize: int,
    *,
    decoupled: bool,
    logits: bool,
) -> tuple[int, int]:
    """The arithmetic and memory traffic that no implementation of a step can avoid.

    The same for every provider that does the same job, so that a rate computed from it falls when
    a provider does more than it has to.

    Args:
        fusion: which head.
        rows: B.
        width: D, of both modalities.
        classes: C.
        itemsize: bytes of a number.
        decoupled: whether the step is one of DGL, with three losses, or plain joint training.
        logits: whether the step hands out its logits.

    Returns:
        Floating-point operations of the matrix products; bytes, inputs read once and gradients (and
        logits) written once.
    """
    out_product = rows * width * classes  # multiply-adds
    film_product = rows * width * 2 * width
    if fusion != "film":
        # z_i is a part of z, so the unimodal logits cost no product of their own.
        products = 6 * out_product
        parameters = 2 * width * classes + classes * (2 if fusion == "sum" else 1)
    else:
        # Decoupled: three branches through the output layer, the conditioner's gradient only
        # through beta. Joint: forward, weight and feature gradient of both layers.
        products = (
            7 * out_product + 2 * film_product + film_product // 2
            if decoupled
            else 3 * out_product + 3 * film_product
        )
        parameters = 2 * width * (width + 1) + classes * (width + 1)
    elements = 2 * (2 * rows * width + parameters)
    if logits:
        elements += rows * classes * (3 if decoupled else 1)
    return 2 * products, itemsize * elements + 8 * rows

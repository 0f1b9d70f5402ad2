"""The problem of the benchmarks: a fusion head on two modalities, and the least work of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Leaf tensors of one head and one batch: B rows, width D in both modalities, C classes."""

    fusion: str
    features: tuple[Tensor, Tensor]  # (B, D) each
    weight: Tensor | tuple[Tensor, Tensor]
    bias: Tensor | tuple[Tensor, Tensor]
    target: Tensor  # (B,)

    def head(self) -> dict[str, Tensor]:
        """The head's parameters by name."""
        named = {}
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            parts = value if isinstance(value, tuple) else (value,)
            named.update({f"{name}[{i}]": part for i, part in enumerate(parts)})
        return named

    def leaves(self) -> dict[str, Tensor]:
        """Everything that receives a gradient, by name."""
        return {f"features[{i}]": h for i, h in enumerate(self.features)} | self.head()

    def as_float64(self) -> Problem:
        """The same values as leaves in float64."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        def leaves(value: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
            return (leaf(value[0]), leaf(value[1])) if isinstance(value, tuple) else leaf(value)

        x, y = self.features
        return replace(
            self,
            features=(leaf(x), leaf(y)),
            weight=leaves(self.weight),
            bias=leaves(self.bias),
        )


def make_problem(
    fusion: str, rows: int, width: int, classes: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Draw random features and targets, and a head of the scale that `nn.Linear` starts with."""
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=random) * scale
        return value.to(device, dtype).requires_grad_()

    small = width**-0.5
    features = (leaf(rows, width), leaf(rows, width))
    target = torch.randint(classes, (rows,), generator=random).to(device)
    weight: Tensor | tuple[Tensor, Tensor]
    bias: Tensor | tuple[Tensor, Tensor]
    if fusion == "concat":
        weight, bias = leaf(classes, 2 * width, scale=small), leaf(classes, scale=small)
    elif fusion == "sum":
        weight = (leaf(classes, width, scale=small), leaf(classes, width, scale=small))
        bias = (leaf(classes, scale=small), leaf(classes, scale=small))
    elif fusion == "film":
        weight = (leaf(2 * width, width, scale=small), leaf(classes, width, scale=small))
        bias = (leaf(2 * width), leaf(classes, scale=small))
    else:
        raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
    return Problem(fusion, features, weight, bias, target)


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


def _concat(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat((x, y), dim=-1), weight, bias)


def _sum(x: Tensor, y: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
    return F.linear(x, weight[0], bias[0]) + F.linear(y, weight[1], bias[1])


def _film(x: Tensor, y: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
    gamma, beta = F.linear(x, weight[0], bias[0]).chunk(2, dim=-1)
    return F.linear(gamma * y + beta, weight[1], bias[1])


# The heads as a joint model has them: (x, y, weight, bias) -> logits.
PLAIN_HEADS: dict[str, Callable[..., Tensor]] = {"concat": _concat, "sum": _sum, "film": _film}
FUSIONS = tuple(PLAIN_HEADS)

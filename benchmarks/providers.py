"""The ways to run one training step of a fusion head with two modalities.

A step takes leaf features and head parameters whose gradients are None, runs forward, loss and
backward, and leaves every gradient in `.grad`. All but `joint` are disentangled gradient learning:
three cross-entropies (fused and one per modality, alpha 1) and the gradients that the method asks
for. To add a provider: write a function `Problem -> step` and put it into `PROVIDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dgl_ext

FUSIONS = ("concat", "sum", "film")

# Runs one training step and returns its logits, fused first.
Step = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """This torch or this machine lacks what a provider needs; the text says what."""


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
    fusion: str, rows: int, width: int, classes: int, itemsize: int, *, decoupled: bool
) -> tuple[int, int]:
    """The arithmetic and memory traffic that no implementation of a step can avoid.

    The same for every provider that does the same job, so that a rate computed from it falls when
    a provider does more than it has to.

    Returns:
        Floating-point operations of the matrix products; bytes, inputs read once and logits and
        gradients written once.
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
    logits = rows * classes * (3 if decoupled else 1)
    elements = 2 * (2 * rows * width + parameters) + logits
    return 2 * products, itemsize * elements + 8 * rows


def _plain_head(fusion: str) -> Callable[..., Tensor]:
    """The head as a joint model has it: (x, y, weight, bias) -> logits."""

    def concat(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(torch.cat((x, y), dim=-1), weight, bias)

    def sum_(x: Tensor, y: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
        return F.linear(x, weight[0], bias[0]) + F.linear(y, weight[1], bias[1])

    def film(x: Tensor, y: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
        gamma, beta = F.linear(x, weight[0], bias[0]).chunk(2, dim=-1)
        return F.linear(gamma * y + beta, weight[1], bias[1])

    return {"concat": concat, "sum": sum_, "film": film}[fusion]


def _joint(problem: Problem) -> Step:
    """Plain joint training: one head, one loss. No DGL; the cost to be measured against."""
    head, leaves = _plain_head(problem.fusion), tuple(problem.leaves().values())

    def step() -> tuple[Tensor, ...]:
        _clear(leaves)
        logits = head(*problem.features, problem.weight, problem.bias)
        F.cross_entropy(logits, problem.target).backward()
        return (logits,)

    return step


def _two_pass(problem: Problem) -> Step:
    """The published recipe: two backward passes, the head's gradients cleared in between.

    The unimodal logits come from the same head with the other modality's features zero-filled.
    For sum the absent modality's layer is left out instead: zeros through it would add its bias,
    which neither the method nor the published code has in these logits.
    """
    head, leaves = _plain_head(problem.fusion), tuple(problem.leaves().values())
    head_parameters = tuple(problem.head().values())
    (x, y), weight, bias, target = problem.features, problem.weight, problem.bias, problem.target

    def unimodal_logits() -> tuple[Tensor, Tensor]:
        if problem.fusion == "sum":
            return F.linear(x, weight[0], bias[0]), F.linear(y, weight[1], bias[1])
        only_x = head(x, torch.zeros_like(y), weight, bias)
        only_y = head(torch.zeros_like(x), y, weight, bias)
        return only_x, only_y

    def step() -> tuple[Tensor, ...]:
        _clear(leaves)
        fused = head(x.detach(), y.detach(), weight, bias)
        logits_x, logits_y = unimodal_logits()
        unimodal_loss = F.cross_entropy(logits_x, target) + F.cross_entropy(logits_y, target)
        fused_loss = F.cross_entropy(fused, target)
        unimodal_loss.backward(retain_graph=True)
        _clear(head_parameters)
        fused_loss.backward()
        return fused, logits_x, logits_y

    return step


def _reference(problem: Problem) -> Step:
    """One backward pass, in plain PyTorch operations."""
    return _one_pass(problem, partial(_forward, dgl_ext.reference.fused_decouple, problem.fusion))


def _compiled(problem: Problem) -> Step:
    """The reference's head and losses under torch.compile; compiled here, before any timing."""
    torch.compiler.reset()  # else the shapes of earlier problems use up the recompile limit
    decoupled = partial(_forward, dgl_ext.reference.fused_decouple, problem.fusion)

    def forward(*tensors: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, logits = decoupled(*tensors)
        # Detached, or the compiled backward would take in a gradient for every logit as well.
        return loss, tuple(z.detach() for z in logits)

    step = _one_pass(problem, torch.compile(forward, dynamic=False))
    try:
        step()
    except Exception as error:  # whatever keeps it from compiling is the reason
        raise Unavailable(f"torch.compile fails here: {reason(error)}") from error
    return step


def _composed(problem: Problem) -> Step:
    """This package's backend "composed": library GEMMs on views of the weight, no kernels."""
    if not dgl_ext._extension.available():
        raise Unavailable(f"the C++ extension is not loaded: {dgl_ext._extension.error()}")
    decouple = partial(dgl_ext.fused_decouple, backend="composed")
    return _one_pass(problem, partial(_forward, decouple, problem.fusion))


def _dgl_ext(problem: Problem) -> Step:
    """This package: on the CPU with the backend that it chooses itself, on CUDA with "cuda"."""
    backend = "auto"
    if _device_type(problem) == "cuda":
        if not dgl_ext._extension.available("cuda"):
            raise Unavailable(
                f"the CUDA extension is not loaded: {dgl_ext._extension.error('cuda')}: "
                "see python -m dgl_ext"
            )
        backend = "cuda"  # "auto" may choose library GEMMs or the reference
    decouple = partial(dgl_ext.fused_decouple, backend=backend)
    step = _one_pass(problem, partial(_forward, decouple, problem.fusion))
    with _OperatorNames() as seen:
        step()
    if not any(name.startswith("dgl_ext::") for name in seen.names):
        raise Unavailable(
            f"backend={backend!r} chose the reference for {_device_type(problem)} "
            f"{problem.features[0].dtype}: see python -m dgl_ext"
        )
    return step


def _device_type(problem: Problem) -> str:
    return problem.features[0].device.type


def _one_pass(problem: Problem, forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]) -> Step:
    leaves = tuple(problem.leaves().values())
    inputs = (problem.features, problem.weight, problem.bias, problem.target)

    def step() -> tuple[Tensor, ...]:
        _clear(leaves)
        loss, logits = forward(*inputs)
        loss.backward()
        return logits

    return step


def _forward(
    decouple: Callable[..., Any], fusion: str, features: Any, weight: Any, bias: Any, target: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The head and three cross-entropies: (loss, logits)."""
    out = decouple(features, weight, bias, fusion=fusion)
    loss = F.cross_entropy(out.fused, target)
    for logits in out.unimodal:
        loss = loss + F.cross_entropy(logits, target)
    return loss, (out.fused, *out.unimodal)


def _clear(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        tensor.grad = None


class _OperatorNames(TorchDispatchMode):
    """Records which operators run, to tell a fallback from the extension's own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def reason(error: Exception) -> str:
    """An error's type and its most telling line: a C++ compiler's message is not the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["(no text)"]
    told = next((line for line in lines if " error: " in line), lines[0])
    return f"{type(error).__name__}: {told}"


@dataclass(frozen=True)
class Provider:
    """One row of the table: how to build a step, and whether it is DGL or plain joint training."""

    build: Callable[[Problem], Step]
    decoupled: bool = True


PROVIDERS: dict[str, Provider] = {
    "joint": Provider(_joint, decoupled=False),
    "two_pass": Provider(_two_pass),
    "reference": Provider(_reference),
    "compiled": Provider(_compiled),
    "composed": Provider(_composed),
    "dgl_ext": Provider(_dgl_ext),
}

"""The ways to run one training step of a fusion head with two modalities.

A step takes leaf features and head parameters whose gradients are None, runs forward, loss and
backward, and leaves every gradient in `.grad`. All but `joint` are disentangled gradient learning:
three cross-entropies (fused and one per modality, alpha 1) and the gradients that the method asks
for.

There are two modes. In "step" a step returns its losses, and nothing says that logits exist. In
"logits" it returns the logits, as a training loop needs them for a loss of its own. To add a
provider: write a function `Problem -> step` and put it into `PROVIDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from problems import Problem, make_problem, plain_head, plain_unimodal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dgl_ext

STEP, LOGITS = "step", "logits"

# What a step of a mode returns, fused first.
OUTPUTS = {STEP: "losses", LOGITS: "logits"}

# Runs one training step and returns its losses or its logits.
Step = Callable[[], tuple[Tensor, ...]]

# Features, weight, bias, target -> the loss to differentiate, and what the step returns.
Forward = Callable[[Any, Any, Any, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


class Unavailable(Exception):
    """This torch or this machine lacks what a provider needs; the text says what."""


def _joint(mode: str, problem: Problem) -> Step:
    """Plain joint training: one head, one loss. No DGL; the cost to be measured against."""
    leaves = tuple(problem.leaves().values())

    def with_loss() -> tuple[Tensor, ...]:
        _clear(leaves)
        # In one expression, so that the logits are not kept longer than autograd needs them.
        loss = F.cross_entropy(plain_head(problem, problem.features), problem.target)
        loss.backward()
        return (loss,)

    def with_logits() -> tuple[Tensor, ...]:
        _clear(leaves)
        logits = plain_head(problem, problem.features)
        F.cross_entropy(logits, problem.target).backward()
        return (logits,)

    return with_loss if mode == STEP else with_logits


def _two_pass(mode: str, problem: Problem) -> Step:
    """The published recipe: two backward passes, the head's gradients cleared in between.

    The unimodal logits come from the same head with the other modality's features zero-filled.
    For sum the absent modality's layer is left out instead: zeros through it would add its bias,
    which neither the method nor the published code has in these logits.
    """
    leaves, head_parameters = tuple(problem.leaves().values()), problem.head()
    target = problem.target

    def step() -> tuple[Tensor, ...]:
        _clear(leaves)
        fused = plain_head(problem, [h.detach() for h in problem.features])
        logits_x, logits_y = plain_unimodal(problem, 0), plain_unimodal(problem, 1)
        loss_x, loss_y = F.cross_entropy(logits_x, target), F.cross_entropy(logits_y, target)
        unimodal_loss = loss_x + loss_y
        fused_loss = F.cross_entropy(fused, target)
        unimodal_loss.backward(retain_graph=True)
        _clear(head_parameters)
        fused_loss.backward()
        return (fused_loss, loss_x, loss_y) if mode == STEP else (fused, logits_x, logits_y)

    return step


def _reference(mode: str, problem: Problem) -> Step:
    """One backward pass, in plain PyTorch operations."""
    return _one_pass(problem, _forward(mode, problem, backend="reference"))


def _compiled(mode: str, problem: Problem) -> Step:
    """The reference's head and losses under torch.compile; compiled here, before any timing."""
    torch.compiler.reset()  # else the shapes of earlier problems use up the recompile limit
    reference = _forward(mode, problem, backend="reference")

    def forward(*inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, outputs = reference(*inputs)
        # Detached, or the compiled backward would take in a gradient for every one as well.
        return loss, tuple(output.detach() for output in outputs)

    step = _one_pass(problem, torch.compile(forward, dynamic=False))
    try:
        step()
    except Exception as error:  # whatever keeps it from compiling is the reason
        raise Unavailable(f"torch.compile fails here: {reason(error)}") from error
    return step


def _linear_cross_entropy(problem: Problem) -> Step:
    """Three calls of torch's own linear_cross_entropy, in chunks; detach cuts as the method asks.

    The size of the chunks is the one that torch thinks best.
    """
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    loss_of = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    return _by_branches(problem, lambda h, w, b, target: loss_of(h, w, target, linear_bias=b))


def _liger(problem: Problem) -> Step:
    """Three calls of Liger's fused linear cross-entropy, as it is called by default."""
    if _device_type(problem) != "cuda":
        raise Unavailable("it runs on CUDA only")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss_of
    except Exception as error:  # triton may break at import in more ways than one
        raise Unavailable(f"liger-kernel cannot be imported: {reason(error)}") from error

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        # Liger makes the weight's gradient only where it makes one of the rows. So rows that are
        # cut off get one, too, which nobody reads: what its users have to pay for that cut.
        if not hidden.requires_grad:
            hidden.requires_grad_()
        return loss_of(hidden, weight, target, bias)

    return _by_branches(problem, loss)


def _by_branches(problem: Problem, loss_of: Callable[..., Tensor]) -> Step:
    """One call of `loss_of` (hidden rows, weight, bias, target) for each branch."""
    branches_of = BRANCHES[problem.fusion]

    def forward(
        features: Any, weight: Any, bias: Any, target: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        losses = tuple(loss_of(*branch, target) for branch in branches_of(*features, weight, bias))
        return reduce(torch.add, losses), losses

    return _one_pass(problem, forward)


Branches = tuple[tuple[Tensor, Tensor, Tensor], ...]  # hidden rows, weight, bias; fused first


def _concat_branches(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Branches:
    fixed, fixed_bias = weight.detach(), bias.detach()
    width = x.shape[-1]
    return (
        (torch.cat((x.detach(), y.detach()), dim=-1), weight, bias),
        (x, fixed[:, :width], fixed_bias),
        (y, fixed[:, width:], fixed_bias),
    )


def _sum_branches(x: Tensor, y: Tensor, weight: Any, bias: Any) -> Branches:
    joined = torch.cat((x.detach(), y.detach()), dim=-1)
    return (
        (joined, torch.cat(weight, dim=1), bias[0] + bias[1]),
        *((h, w.detach(), b.detach()) for h, w, b in zip((x, y), weight, bias, strict=True)),
    )


def _film_branches(x: Tensor, y: Tensor, weight: Any, bias: Any) -> Branches:
    (film_weight, out_weight), (film_bias, out_bias) = weight, bias
    gamma, beta = F.linear(x.detach(), film_weight, film_bias).chunk(2, dim=-1)
    b_gamma, b_beta = film_bias.detach().chunk(2)
    only_x = F.linear(x, film_weight.detach()[len(b_gamma) :], b_beta)
    fixed = out_weight.detach(), out_bias.detach()
    return (
        (gamma * y.detach() + beta, out_weight, out_bias),
        (only_x, *fixed),
        (b_gamma * y + b_beta, *fixed),
    )


BRANCHES = {"concat": _concat_branches, "sum": _sum_branches, "film": _film_branches}


def _executor(backend: str, mode: str, problem: Problem) -> Step:
    """This package with one of its two executors on CUDA, whatever it would choose itself."""
    if _device_type(problem) != "cuda":
        raise Unavailable("it runs on CUDA only")
    return _own(problem, _forward(mode, problem, backend=backend))


def _dgl_ext(mode: str, problem: Problem) -> Step:
    """This package with the backend that it chooses itself."""
    return _own(problem, _forward(mode, problem))


def _dgl_ext_logits(problem: Problem) -> Step:
    """This package's head with logits, and `F.cross_entropy` on those of each branch."""
    return _own(problem, _head_then_losses(STEP, dgl_ext.fused_decouple, problem.fusion))


def _own(problem: Problem, forward: Forward) -> Step:
    """A step by this package's ops; raises `Unavailable` if its reference would run."""
    device_type = _device_type(problem)
    if device_type == "cuda" and not dgl_ext._ops.extension.available("cuda"):
        raise Unavailable(
            f"the CUDA extension is not loaded: {dgl_ext._ops.extension.error('cuda')}: "
            "see python -m dgl_ext"
        )
    # A small problem tells whether ops run, since that does not depend on the size.
    like = problem.features[0]
    small = make_problem(problem.fusion, 2, 3, 4, like.device, like.dtype)
    with _OperatorNames() as seen:
        _one_pass(small, forward)()
    if not any(name.startswith("dgl_ext::") for name in seen.names):
        raise Unavailable(
            f"dgl_ext takes the reference for {device_type} {like.dtype}: see python -m dgl_ext"
        )
    return _one_pass(problem, forward)


def _device_type(problem: Problem) -> str:
    return problem.features[0].device.type


def _one_pass(problem: Problem, forward: Forward) -> Step:
    leaves = tuple(problem.leaves().values())
    inputs = (problem.features, problem.weight, problem.bias, problem.target)

    def step() -> tuple[Tensor, ...]:
        _clear(leaves)
        loss, outputs = forward(*inputs)
        loss.backward()
        return outputs

    return step


def _forward(mode: str, problem: Problem, **options: str) -> Forward:
    """What dgl_ext offers for a mode."""
    fusion = problem.fusion
    if mode == STEP:
        cross_entropy = partial(dgl_ext.fused_decouple_cross_entropy, fusion=fusion, **options)

        def forward(
            features: Any, weight: Any, bias: Any, target: Tensor
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = cross_entropy(features, weight, target, bias=bias)
            return loss.total, (loss.fused, *loss.unimodal)

        return forward
    return _head_then_losses(mode, partial(dgl_ext.fused_decouple, **options), fusion)


def _head_then_losses(mode: str, decouple: Callable[..., Any], fusion: str) -> Forward:
    """The head, then a cross-entropy per branch."""

    def forward(
        features: Any, weight: Any, bias: Any, target: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = decouple(features, weight, bias, fusion=fusion)
        logits = (out.fused, *out.unimodal)
        losses = tuple(F.cross_entropy(z, target) for z in logits)
        return reduce(torch.add, losses), losses if mode == STEP else logits

    return forward


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


def _providers(mode: str) -> dict[str, Provider]:
    """By name, in the order of the tables."""
    of_step = {
        "linear_cross_entropy": Provider(_linear_cross_entropy),
        "liger": Provider(_liger),
        "dgl_ext_logits": Provider(_dgl_ext_logits),
    }
    return {
        "joint": Provider(partial(_joint, mode), decoupled=False),
        "two_pass": Provider(partial(_two_pass, mode)),
        "reference": Provider(partial(_reference, mode)),
        "compiled": Provider(partial(_compiled, mode)),
        **(of_step if mode == STEP else {}),
        "fused": Provider(partial(_executor, "fused", mode)),
        "library": Provider(partial(_executor, "library", mode)),
        "dgl_ext": Provider(partial(_dgl_ext, mode)),
    }


PROVIDERS = {mode: _providers(mode) for mode in OUTPUTS}

"""Which loss reaches which parameter: the table of `dgl_ext.diagnostics.routing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._arguments.validate import check_loss, check_sequence

# Called with a model, or a head, and what it is to be called on; returns losses by name.
LossFunction = Callable[[Any, Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Route:
    """A row of a routing table: one parameter and what each loss sends to it.

    Attributes:
        name: of the parameter.
        trainable: whether it requires a gradient.
        norms: for each loss the norm of its gradient, or None where none arrives.
        expected: the losses that should reach it, or None if nobody said.
    """

    name: str
    trainable: bool
    norms: dict[str, float | None]
    expected: tuple[str, ...] | None

    @property
    def reached_by(self) -> list[str]:
        """The losses whose gradient arrives, zero or not."""
        return [loss for loss, norm in self.norms.items() if norm is not None]

    @property
    def leaked(self) -> list[str]:
        """The losses that arrive and are not among those expected."""
        expected = self.expected
        return [] if expected is None else [n for n in self.reached_by if n not in expected]

    @property
    def missing(self) -> list[str]:
        """The losses that are expected and do not arrive."""
        return [name for name in self.expected or () if self.norms[name] is None]

    @property
    def remarks(self) -> list[str]:
        """What is worth a look."""
        remarks = []
        if not self.trainable:
            remarks.append("frozen")
        elif not self.reached_by:
            remarks.append("unreached")
        remarks += [f"leaked: {name}" for name in self.leaked]
        return remarks + [f"missing: {name}" for name in self.missing]


@dataclass(frozen=True)
class Routing:
    """Which loss reaches which parameter; printed, it is a table.

    In the table `-` is no gradient, which leaves a parameter as it is, and `0` one that is there
    and zero, by which an optimizer with momentum or weight decay still moves it.

    Attributes:
        losses: their names.
        rows: one per parameter, in the order of `model.named_parameters()`.
    """

    losses: tuple[str, ...]
    rows: tuple[Route, ...]

    @property
    def frozen(self) -> list[str]:
        """Parameters that require no gradient."""
        return [row.name for row in self.rows if not row.trainable]

    @property
    def unreached(self) -> list[str]:
        """Parameters that no loss reaches, the frozen ones among them."""
        return [row.name for row in self.rows if not row.reached_by]

    @property
    def leaked(self) -> list[tuple[str, str]]:
        """Pairs (parameter, loss): it arrives and is not among those expected."""
        return [(row.name, loss) for row in self.rows for loss in row.leaked]

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Pairs (parameter, loss): it is expected and does not arrive."""
        return [(row.name, loss) for row in self.rows for loss in row.missing]

    @property
    def zero(self) -> list[tuple[str, str]]:
        """Pairs (parameter, loss): it arrives and is zero everywhere."""
        return [
            (row.name, loss) for row in self.rows for loss, norm in row.norms.items() if norm == 0
        ]

    @property
    def unmatched(self) -> list[str]:
        """Parameters of which `expect` said nothing."""
        return [row.name for row in self.rows if row.expected is None]

    def reached_by(self, loss: str) -> list[str]:
        """Parameters at which that loss's gradient arrives, zero or not."""
        if loss not in self.losses:
            names = ", ".join(f'"{name}"' for name in self.losses)
            raise ValueError(f"loss: expected one of {names}, got {loss!r}")
        return [row.name for row in self.rows if row.norms[loss] is not None]

    def __str__(self) -> str:
        def cell(norm: float | None) -> str:
            return "-" if norm is None else "0" if norm == 0 else f"{norm:.2e}"

        told = any(row.expected is not None for row in self.rows)
        lines = [["parameter", *self.losses, ""]]
        for row in self.rows:
            remarks = row.remarks + (["unmatched"] if told and row.expected is None else [])
            lines.append([row.name, *map(cell, row.norms.values()), ", ".join(remarks)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if k in (0, len(line) - 1) else text.rjust(width)
                for k, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def routing(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction,
    expect: Mapping[str, str | Sequence[str]] | None = None,
) -> Routing:
    """Finds which loss reaches which parameter, by one forward pass and one backward pass per loss.

    For a look before training, or in a test of a training script; it waits for the device. It finds
    parameters that nothing trains, losses that leak past a truncation, and names that no rule
    matches. `.grad`, buffers and the random state are afterwards what they were.

    Args:
        model: in the mode in which it trains. Of a `DistributedDataParallel` its `module` is
            taken, names included, so that no gradient is exchanged; what is compiled runs eagerly,
            under its plain names.
        batch: passed on to `loss_fn`.
        loss_fn: called as `loss_fn(model, batch)`, returns scalar losses by name, such as
            `{"fused": ..., "audio": ..., "video": ...}`.
        expect: by a pattern of parameter names (as for file names: `*`, `?`), the loss or losses
            that should reach them: `{"fusion.*": "fused", "audio_encoder.*": "audio"}`. The first
            pattern that matches a name counts.

    Returns:
        `Routing`: rows, a table when printed, and the lists `unreached`, `frozen`, `leaked`,
        `missing`, `zero`, `unmatched`, `reached_by(loss)`.

    Raises:
        TypeError: an argument, or what `loss_fn` returns, is of the wrong type.
        ValueError: a loss is not a scalar, or `expect` names a loss that is not there, or has a
            pattern that matches no parameter.

    Example:
        >>> model = torch.nn.ModuleDict({
        ...     "audio": torch.nn.Linear(3, 4), "video": torch.nn.Linear(3, 4),
        ...     "fusion": dgl_ext.nn.ConcatFusion((4, 4), 5, bias=False),
        ... }).requires_grad_()
        >>> def loss_fn(model, batch):
        ...     out = model["fusion"](model["audio"](batch), model["video"](batch))
        ...     losses = [z.square().mean() for z in (out.fused, *out.unimodal)]
        ...     return dict(zip(("fused", "audio", "video"), losses))
        >>> found = routing(model, torch.randn(8, 3), loss_fn, {"fusion.*": "fused"})
        >>> found.reached_by("video"), found.leaked
        (['video.weight', 'video.bias'], [])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = _unwrapped(model)
    named = {name.replace(_COMPILED, ""): p for name, p in model.named_parameters()}
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    norms: dict[str, dict[str, float | None]] = {name: {} for name in named}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept({p.device for p in named.values()}),
        buffers_kept(model),
        # A compiled graph has zeros for what a loss does not reach.
        torch.compiler.set_stance("force_eager"),
    ):
        losses = named_losses(loss_fn, model, batch)
        for loss_name, loss in losses.items():
            found: Sequence[Tensor | None] = [None] * len(trainable)
            if loss.requires_grad and trainable:
                leaves = list(trainable.values())
                found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            grads = dict(zip(trainable, found, strict=True))
            for name in named:
                norms[name][loss_name] = _norm(grads.get(name))
    expected = _expected(expect, list(named), list(losses))
    rows = [Route(n, p.requires_grad, norms[n], expected.get(n)) for n, p in named.items()]
    return Routing(tuple(losses), tuple(rows))


def named_losses(loss_fn: LossFunction, model: Any, batch: Any) -> dict[str, Tensor]:
    """Returns what `loss_fn` does, if that is scalars by name."""
    losses = loss_fn(model, batch)
    if not isinstance(losses, Mapping) or not losses:
        raise TypeError(
            f"loss_fn: expected it to return a dict of losses, got {type(losses).__name__}"
            + (" without entries" if isinstance(losses, Mapping) else "")
        )
    return {name: check_loss(f'loss_fn: "{name}"', value) for name, value in losses.items()}


# What torch.compile puts before the names of a module's parameters.
_COMPILED = "_orig_mod."


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _norm(grad: Tensor | None) -> float | None:
    if grad is None:
        return None
    if grad.is_sparse:
        grad = grad.coalesce().values()
    return float(torch.linalg.vector_norm(grad, dtype=wide_dtype(grad)))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In which no norm of a tensor of any lesser dtype overflows or vanishes."""
    return torch.promote_types(tensor.dtype, torch.float64)


def _expected(expect: object, names: list[str], losses: list[str]) -> dict[str, tuple[str, ...]]:
    """By parameter name, the losses that the first matching pattern asks for."""
    if expect is None:
        return {}
    if not isinstance(expect, Mapping):
        raise TypeError(
            f"expect: expected a dict of losses by pattern, got {type(expect).__name__}"
        )
    expected: dict[str, tuple[str, ...]] = {}
    for pattern, value in expect.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"expect: expected patterns of parameter names, got {type(pattern).__name__}"
            )
        what = "the name of a loss, or a sequence of them"
        single = isinstance(value, str)
        wanted = (value,) if single else check_sequence(f'expect["{pattern}"]', value, what)
        for loss in wanted:
            if loss not in losses:
                quoted = ", ".join(f'"{name}"' for name in losses)
                raise ValueError(f'expect["{pattern}"]: expected one of {quoted}, got {loss!r}')
        plain = pattern.replace(_COMPILED, "")
        matching = [name for name in names if fnmatchcase(name, plain)]
        if not matching:
            raise ValueError(f'expect: pattern "{pattern}" matches no parameter')
        for name in matching:
            expected.setdefault(name, tuple(map(str, wanted)))
    return expected


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Has a model read and write copies of its buffers, and gives it back its own afterwards.

    They are not written back: that would disturb a graph that has saved them.
    """
    copies: dict[int, Tensor] = {}
    places = [(module, dict(module._buffers)) for module in model.modules()]
    for module, buffers in places:
        for name, buffer in buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, buffers in places:
            module._buffers.clear()
            module._buffers.update(buffers)


def random_state_kept(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """Puts the random state of the CPU and the devices back, without waiting for a device."""
    gpus = [device for device in devices if device.type == "cuda"]
    return torch.random.fork_rng(gpus, device_type="cuda")

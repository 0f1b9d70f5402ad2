"""Checks and times every provider on one problem of the fusion benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import providers
import torch

SIZE_COLUMNS = ("batch", "width", "classes")

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One problem in the table."""

    fusion: str
    size: tuple[int, int, int]  # batch, width, classes
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.fusion} {'x'.join(str(n) for n in self.size)}"

    def problem(self) -> providers.Problem:
        return providers.make_problem(self.fusion, *self.size, self.device, self.dtype)


@dataclass
class Timing:
    """What became of the providers at one cell.

    Attributes:
        names: the providers to time.
        excluded: status and note of those that are not timed: "left out" (this torch or machine
            lacks something), "wrong" (its results differ) or "failed" (it raised).
        times: microseconds a step of the others, one value per round.
    """

    names: Sequence[str]
    excluded: dict[str, tuple[str, str]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def exclude(self, name: str, status: str, note: str) -> None:
        self.excluded[name] = (status, note)
        self.times.pop(name, None)


def measure(
    cell: Cell,
    timing: Timing,
    seconds: float,
    *,
    min_rounds: int = harness.MIN_ROUNDS,
    load: harness.ForeignLoad | None = None,
    on_share: Callable[[float], None] | None = None,
) -> None:
    """Check the providers, then time those that are right, adding to `timing` and `load`."""
    truth = snapshot(cell.problem(), providers.PROVIDERS["reference"])[1]
    steps: dict[str, harness.Step] = {}
    for name in timing.names:
        if name in timing.excluded:
            continue
        provider = providers.PROVIDERS[name]
        try:
            step, results = snapshot(cell.problem(), provider)
        except providers.Unavailable as reason:
            timing.exclude(name, "left out", str(reason))
            continue
        except Exception as error:  # one broken provider must not end the run
            timing.exclude(name, "failed", f"{type(error).__name__}: {error}")
            continue
        if wrong := difference(results, truth, cell.dtype, everything=provider.decoupled):
            timing.exclude(name, "wrong", wrong)
        else:
            steps[name] = step
    if not steps:
        return
    with load or harness.ForeignLoad():
        rounds = harness.time_alternating(
            steps, cell.device, seconds, min_rounds=min_rounds, on_round=on_share
        )
    for name, values in rounds.items():
        timing.times.setdefault(name, []).extend(values)


def snapshot(
    problem: providers.Problem, provider: providers.Provider
) -> tuple[harness.Step, dict[str, torch.Tensor | None]]:
    """Build a provider's step, run it once, and copy all that it computed, by name."""
    step = provider.build(problem)
    logits = step()
    results: dict[str, torch.Tensor | None] = {
        f"logits[{i}]": z.detach().clone() for i, z in enumerate(logits)
    }
    for name, leaf in problem.leaves().items():
        results[f"{name}.grad"] = None if leaf.grad is None else leaf.grad.clone()
    return step, results


def difference(
    results: dict[str, torch.Tensor | None],
    truth: dict[str, torch.Tensor | None],
    dtype: torch.dtype,
    *,
    everything: bool,
) -> str:
    """Say where results differ from the reference; empty if they do not.

    The measure is the L2 norm of the difference relative to the reference's. The limit is a
    rounding error with room for other orders of summation: 100 units of the dtype's epsilon, 4 in
    16 bits, where rounding the stored results outweighs the sums (those are taken in float32).
    """
    epsilon = torch.finfo(dtype).eps
    limit = (4 if torch.finfo(dtype).bits == 16 else 100) * epsilon
    for name in truth if everything else ("logits[0]",):
        got, expected = results.get(name), truth[name]
        if got is None or expected is None:
            return f"{name} is missing"
        if got.shape != expected.shape:
            return f"{name} has shape {tuple(got.shape)}, the reference {tuple(expected.shape)}"
        scale = max(expected.double().norm().item(), epsilon)
        error = (got.double() - expected.double()).norm().item() / scale
        if not error <= limit:  # NaN is wrong too
            return f"{name} differs from the reference by {error:.1e} (limit {limit:.1e})"
    return ""


def rows(cell: Cell, timing: Timing, ceiling: harness.Ceiling) -> list[Row]:
    """One table row per provider; only those with status "ok" have figures."""
    result = []
    for name in timing.names:
        status, note = timing.excluded.get(name, ("ok", ""))
        row = {"fusion": cell.fusion, **dict(zip(SIZE_COLUMNS, cell.size, strict=True))}
        row |= {"provider": name, "status": status, "note": note}
        if status == "ok":
            row |= _figures(cell, name, timing.times, ceiling)
        result.append(row)
    return result


def _figures(cell: Cell, name: str, times: dict[str, list[float]], ceiling: harness.Ceiling) -> Row:
    """The numbers of one row: time, ratio to every provider timed with it, rates."""
    step = harness.spread(times[name])
    figures: Row = {
        "median_us": step.median,
        "p20_us": step.p20,
        "p80_us": step.p80,
        "rounds": len(times[name]),
    }
    for other, baseline in times.items():
        ratio = harness.paired_ratio(times[name], baseline)
        figures[f"ratio_to_{other}"] = ratio.median
        figures[f"ratio_to_{other}_p20"] = ratio.p20
        figures[f"ratio_to_{other}_p80"] = ratio.p80
    flops, nbytes = providers.least_work(
        cell.fusion, *cell.size, cell.dtype.itemsize, decoupled=providers.PROVIDERS[name].decoupled
    )
    seconds = step.median / 1e6
    compute_bound = flops / ceiling.flops_per_second > nbytes / ceiling.bytes_per_second
    figures.update(
        gflops_per_s=flops / seconds / 1e9,
        gbytes_per_s=nbytes / seconds / 1e9,
        bound="compute" if compute_bound else "memory",
        share_of_ceiling=ceiling.floor_seconds(flops, nbytes) / seconds,
    )
    return figures


def columns() -> list[str]:
    """The columns of a row, in order."""
    ratios = [
        f"ratio_to_{name}{suffix}"
        for name in providers.PROVIDERS
        for suffix in ("", "_p20", "_p80")
    ]
    return [
        *("fusion", *SIZE_COLUMNS, "provider", "status", "note"),
        *("median_us", "p20_us", "p80_us", "rounds", *ratios),
        *("gflops_per_s", "gbytes_per_s", "bound", "share_of_ceiling"),
    ]

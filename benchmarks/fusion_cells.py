"""Checks and times every provider, in every execution, on one problem of the fusion benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import cuda_steps
import harness
import problems
import providers
import torch

SIZE_COLUMNS = ("batch", "width", "classes")
EAGER, GRAPH = "eager", "graph"
TF32_EPSILON = 2.0**-10

Row = dict[str, Any]
Step = harness.Step
Results = dict[str, torch.Tensor | None]  # None: no gradient
Built = Callable[[], tuple[Step, Results]]


@dataclass(frozen=True)
class Cell:
    """One problem in the table, and what a step on it hands out (`providers.OUTPUTS`)."""

    mode: str
    fusion: str
    size: tuple[int, int, int]  # batch, width, classes
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.fusion} {'x'.join(str(n) for n in self.size)}"

    def problem(self) -> problems.Problem:
        return problems.make_problem(self.fusion, *self.size, self.device, self.dtype)


class Candidate(NamedTuple):
    """What is timed: a provider's step, called from Python or replayed as a CUDA graph."""

    provider: str
    execution: str


@dataclass
class Timing:
    """What became of the candidates at one cell.

    Attributes:
        names: the providers to time.
        executions: how to run each, EAGER or GRAPH (CUDA only).
        excluded: status and note of those that are not timed: "left out" (this torch or machine
            lacks something), "wrong" (its results differ) or "failed" (it raised).
        times: microseconds a step of the others, one value per round.
        launches: kernels a step, where they were counted; why not, where they could not be.
    """

    names: Sequence[str]
    executions: Sequence[str] = (EAGER,)
    excluded: dict[Candidate, tuple[str, str]] = field(default_factory=dict)
    times: dict[Candidate, list[float]] = field(default_factory=dict)
    launches: dict[Candidate, int | str] = field(default_factory=dict)

    def wanted(self, name: str) -> list[Candidate]:
        """The provider's candidates that nothing speaks against."""
        candidates = [Candidate(name, execution) for execution in self.executions]
        return [candidate for candidate in candidates if candidate not in self.excluded]

    def exclude(self, candidate: Candidate, status: str, note: str) -> None:
        self.excluded[candidate] = (status, note)
        self.times.pop(candidate, None)


def measure(
    cell: Cell,
    timing: Timing,
    seconds: float,
    *,
    min_rounds: int = harness.MIN_ROUNDS,
    load: harness.ForeignLoad | None = None,
    on_share: Callable[[float], None] | None = None,
    gpu: cuda_steps.Gpu | None = None,
) -> None:
    """Check the candidates, then time those that are right, adding to `timing` and `load`.

    All candidates take turns, however they are executed. `gpu` captures the steps for GRAPH.
    """
    steps = right_steps(cell, timing, gpu)
    if not steps:
        return
    with load or harness.ForeignLoad():
        rounds = harness.time_alternating(
            steps, cell.device, seconds, min_rounds=min_rounds, on_round=on_share
        )
    for candidate, values in rounds.items():
        timing.times.setdefault(candidate, []).extend(values)


def count_launches(cell: Cell, timing: Timing, gpu: cuda_steps.Gpu) -> None:
    """Count the kernels of each candidate that was timed.

    Not to be mixed with timing: once started, a profiler can slow down all that comes later.
    """
    for candidate, step in right_steps(cell, timing, gpu).items():
        try:
            timing.launches[candidate] = gpu.launches(step)
        except Exception as error:  # times stand without a count
            unavailable = isinstance(error, providers.Unavailable)
            timing.launches[candidate] = str(error) if unavailable else providers.reason(error)


def right_steps(cell: Cell, timing: Timing, gpu: cuda_steps.Gpu | None) -> dict[Candidate, Step]:
    """Build all steps that are wanted; exclude from `timing` those that are not right."""
    if gpu is None and GRAPH in timing.executions:
        raise ValueError(f"gpu: expected one to capture for {GRAPH!r} with, got None")
    available = providers.PROVIDERS[cell.mode]
    truth = snapshot(cell.mode, "reference", cell.problem().as_float64())[1]
    steps: dict[Candidate, Step] = {}

    def check(candidates: Sequence[Candidate], build: Built) -> Step | None:
        everything = available[candidates[0].provider].decoupled
        try:
            step, results = build()
            wrong = difference(results, truth, cell.dtype, everything=everything)
            verdict = ("wrong", wrong) if wrong else None
        except providers.Unavailable as reason:
            verdict = ("left out", str(reason))
        except Exception as error:  # one broken provider must not end the run
            verdict = ("failed", f"{type(error).__name__}: {error}")
        if verdict is None:
            return step
        for candidate in candidates:
            timing.exclude(candidate, *verdict)
        return None

    for name in timing.names:
        wanted = timing.wanted(name)
        if not wanted:
            continue
        problem = cell.problem()
        step = check(wanted, partial(snapshot, cell.mode, name, problem))
        if step is None:
            continue
        for candidate in wanted:
            if candidate.execution == GRAPH:
                replay = check([candidate], partial(_capture, cell.mode, gpu, problem, step))
                steps |= {} if replay is None else {candidate: replay}
            else:
                steps[candidate] = step
    return steps


def snapshot(mode: str, provider: str, problem: problems.Problem) -> tuple[Step, Results]:
    """Build a provider's step, run it once, and copy all that it computed, by name."""
    step = providers.PROVIDERS[mode][provider].build(problem)
    outputs = step()
    gradients = {name: leaf.grad for name, leaf in problem.leaves().items()}
    return step, _copies(mode, outputs, gradients)


def _capture(
    mode: str, gpu: cuda_steps.Gpu, problem: problems.Problem, step: providers.Step
) -> tuple[Step, Results]:
    """Capture a step, replay it once, and copy all that the replay computed, by name."""
    captured = gpu.capture(step, problem.leaves())
    return captured, _copies(mode, *captured.results())


def _copies(mode: str, outputs: Sequence[torch.Tensor], gradients: Results) -> Results:
    kind = providers.OUTPUTS[mode]
    results: Results = {f"{kind}[{i}]": value.detach().clone() for i, value in enumerate(outputs)}
    for name, gradient in gradients.items():
        results[f"{name}.grad"] = None if gradient is None else gradient.clone()
    return results


def difference(
    results: Results,
    truth: Results,
    dtype: torch.dtype,
    *,
    everything: bool,
) -> str:
    """Say where results differ from the reference in float64; empty if they do not.

    The measure is the L2 norm of the difference relative to the reference's. The limit is a
    rounding error with room for other orders of summation: 100 units of the dtype's epsilon, 4 in
    16 bits, where rounding the stored results outweighs the sums (those are taken in float32), and
    4 of tf32's where float32 products may be tf32.

    Args:
        results: what is to be judged.
        truth: what the reference computed.
        dtype: that of the step which is judged.
        everything: whether all must agree, or only the first output, that of the fused branch.
    """
    epsilon = torch.finfo(dtype).eps
    limit = (4 if torch.finfo(dtype).bits == 16 else 100) * epsilon
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limit = 4 * TF32_EPSILON
    for name in truth if everything else list(truth)[:1]:
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
    """One table row per candidate; only those with status "ok" have figures."""
    result = []
    for candidate in (Candidate(name, way) for way in timing.executions for name in timing.names):
        status, note = timing.excluded.get(candidate, ("ok", ""))
        launches = timing.launches.get(candidate)
        if isinstance(launches, str):
            launches, note = None, f"kernels not counted: {launches}"
        row = {"fusion": cell.fusion, **dict(zip(SIZE_COLUMNS, cell.size, strict=True))}
        row |= {**candidate._asdict(), "status": status, "note": note, "launches": launches}
        if status == "ok":
            row |= _figures(cell, candidate, timing.times, ceiling)
        result.append(row)
    return result


def _figures(
    cell: Cell,
    candidate: Candidate,
    times: dict[Candidate, list[float]],
    ceiling: harness.Ceiling,
) -> Row:
    """The numbers of one row: time, ratio to every provider executed alike, rates."""
    mine = times[candidate]
    step = harness.spread(mine)
    figures: Row = {
        "median_us": step.median,
        "p20_us": step.p20,
        "p80_us": step.p80,
        "rounds": len(mine),
    }
    for other, baseline in times.items():
        if other.execution == candidate.execution:
            ratio = harness.paired_ratio(mine, baseline)
            figures[f"ratio_to_{other.provider}"] = ratio.median
            figures[f"ratio_to_{other.provider}_p20"] = ratio.p20
            figures[f"ratio_to_{other.provider}_p80"] = ratio.p80
    flops, nbytes = problems.least_work(
        cell.fusion,
        *cell.size,
        cell.dtype.itemsize,
        decoupled=providers.PROVIDERS[cell.mode][candidate.provider].decoupled,
        logits=cell.mode == providers.LOGITS,
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


def columns(mode: str) -> list[str]:
    """The columns of a row, in order."""
    ratios = [
        f"ratio_to_{name}{suffix}"
        for name in providers.PROVIDERS[mode]
        for suffix in ("", "_p20", "_p80")
    ]
    return [
        *("fusion", *SIZE_COLUMNS, "provider", "execution", "status", "note"),
        *("median_us", "p20_us", "p80_us", "rounds", "launches", *ratios),
        *("gflops_per_s", "gbytes_per_s", "bound", "share_of_ceiling"),
    ]

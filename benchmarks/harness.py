"""Timing and machine facts, shared by the benchmarks.

How a time is measured, and why:

* Machines are noisy: one and the same step can take twice as long a minute later. So the
  candidates are never timed one after another. Time is cut into *rounds*; in each round every
  candidate runs one short *block* of steps (about 4 ms, at least one step), in a random order.
  A slow phase of the machine then falls on all of them.
* A round's value for a candidate is the median of the step times in its block. The first step
  of a block of four or more is not counted: it finds the caches full of another candidate's data.
* A reported time is the median over the rounds, with the 20th and 80th percentile.
* A reported ratio is the median over the rounds of the ratio *within* a round (p20, p80
  likewise), not the ratio of two medians: what slows a whole round down cancels out.
* On a CPU a step is timed by the monotonic clock. On a GPU it is timed by CUDA events, with the
  L2 cache overwritten before every step. The host may queue a step while the cache is being
  overwritten; the figure is GPU time where the host keeps up and host time where it does not.
  A step that is captured as a CUDA graph is one launch to the host, which then keeps up.
* Python's garbage collector is off while steps are timed.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BLOCK_SECONDS = 0.004
MIN_ROUNDS = 5

STATISTIC = (
    "median over rounds (p20, p80) of the median step time of a block; a ratio is the median over "
    "rounds of the ratio within one round"
)

Step = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise measurements; percentiles are interpolated linearly."""
    if not values:
        raise ValueError("values: expected at least one measurement, got none")
    ordered = sorted(values)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Spread(percentile(0.5), percentile(0.2), percentile(0.8))


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Summarise the ratios of two candidates, round by round."""
    if len(times) != len(baseline):
        raise ValueError(
            f"baseline: expected as many rounds as times ({len(times)}), got {len(baseline)}"
        )
    return spread([a / b for a, b in zip(times, baseline, strict=True)])


def time_alternating(
    steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    *,
    min_rounds: int = MIN_ROUNDS,
    on_round: Callable[[float], None] | None = None,
) -> dict[str, list[float]]:
    """Time several steps in alternating blocks.

    Args:
        steps: what to time, by name. Each call must do the whole step, a fresh graph included.
        device: where the steps run; on CUDA, events and an L2 flush are used.
        seconds: how long to go on; `min_rounds` may make it longer.
        min_rounds: the least number of rounds.
        on_round: called after each round with the share of the time that has passed (0 to 1).

    Returns:
        Microseconds a step, one value per round, by name.
    """
    run_block = _CudaBlock(device) if device.type == "cuda" else _cpu_block
    order = list(steps)
    shuffle = random.Random(0).shuffle
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        counts = {name: _steps_per_block(run_block, step) for name, step in steps.items()}
        start = time.perf_counter()
        done, passed = 0, 0.0
        while done < min_rounds or passed < seconds:
            shuffle(order)
            for name in order:
                rounds[name].append(run_block(steps[name], counts[name]) * 1e6)
            done += 1
            passed = time.perf_counter() - start
            if on_round is not None:
                on_round(min(1.0, passed / seconds, done / min_rounds))
    finally:
        gc.enable()
    return rounds


def time_alone(
    step: Step, device: torch.device, seconds: float, *, min_steps: int = 1
) -> list[float]:
    """Time one warm step again and again, without rivals.

    For steps so large that each has a process of its own.

    Returns:
        Microseconds of each step.
    """
    run_block = _CudaBlock(device) if device.type == "cuda" else _cpu_block
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < min_steps or time.perf_counter() - start < seconds:
        times.append(run_block(step, 1) * 1e6)
    return times


def _steps_per_block(run_block: Callable[[Step, int], float], step: Step) -> int:
    """Warm a step up and choose how many of it make a block."""
    once = run_block(step, 1)
    if once < BLOCK_SECONDS:
        once = min(run_block(step, 3), run_block(step, 5))
    return max(1, min(1000, round(BLOCK_SECONDS / once)))


def _block_value(seconds: list[float]) -> float:
    return statistics.median(seconds[1:] if len(seconds) >= 4 else seconds)


def _cpu_block(step: Step, count: int) -> float:
    clock = time.perf_counter
    seconds = []
    for _ in range(count):
        start = clock()
        step()
        seconds.append(clock() - start)
    return _block_value(seconds)


class _CudaBlock:
    """Times a block by CUDA events; the L2 cache is overwritten before each step."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(max(4 * l2, 1 << 26), dtype=torch.int8, device=device)

    def __call__(self, step: Step, count: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            for start, end in events:
                self._flush.fill_(1)
                start.record()
                step()
                end.record()
            torch.cuda.synchronize()
        return _block_value([start.elapsed_time(end) / 1e3 for start, end in events])


class ForeignLoad:
    """A context manager that adds up how much of the CPUs other processes took meanwhile.

    Child processes that have ended count as this one.
    """

    def __init__(self) -> None:
        self._foreign = 0.0
        self._total = 0.0

    def __enter__(self) -> ForeignLoad:
        self._start = self._clocks()
        return self

    def __exit__(self, *_: object) -> None:
        own, busy, total = (b - a for a, b in zip(self._start, self._clocks(), strict=True))
        self._foreign += max(0.0, busy - own)
        self._total += total

    @property
    def share(self) -> float | None:
        """CPU seconds of other processes by CPU seconds there were; None where unknown."""
        return self._foreign / self._total if self._total else None

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        """CPU seconds: used by this process, used by all, passed."""
        try:
            line = Path("/proc/stat").read_text().partition("\n")[0]
        except OSError:
            return 0.0, 0.0, 0.0  # not Linux
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
        busy = user + nice + system + irq + softirq + steal
        ticks = os.sysconf("SC_CLK_TCK")
        children = os.times()
        own = time.process_time() + children.children_user + children.children_system
        return own, busy / ticks, (busy + idle + iowait) / ticks


@dataclass(frozen=True)
class Ceiling:
    """The best that this machine was seen to do: plain matrix products and plain copies."""

    flops_per_second: float
    bytes_per_second: float

    def floor_seconds(self, flops: float, nbytes: float) -> float:
        """The least time in which so much arithmetic and memory traffic could be done."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)


def measure_ceiling(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceiling:
    """Measure GEMM FLOP/s and copy bytes/s (read + written); the best of several runs counts."""
    on_cuda = device.type == "cuda"
    n = 512 if quick else (8192 if on_cuda else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    nbytes = (1 << 24) if quick else (1 << 30 if on_cuda else 1 << 28)
    source = torch.randint(-128, 127, (nbytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    rounds = time_alternating(
        {
            "gemm": lambda: torch.mm(a, b, out=product),
            "copy": lambda: target.copy_(source),
        },
        device,
        seconds=0.2 if quick else 2.0,
    )
    return Ceiling(2e6 * n**3 / min(rounds["gemm"]), 2e6 * nbytes / min(rounds["copy"]))


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a reader needs to judge a figure or to repeat it."""
    import dgl_ext

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "dgl_ext": dgl_ext.__version__,
        "git_sha": _git_sha(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _git_sha() -> str:
    """The commit of this checkout, marked where files differ from it; 'unknown' without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        sha = git("rev-parse", "HEAD")
        return f"{sha}-dirty" if git("status", "--porcelain", "--untracked-files=no") else sha
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""One provider at one size of the memory benchmark, in a process of its own.

`bench_memory.py` starts it with a request as JSON and reads one line of JSON. A process of its own,
because what an earlier step left in the allocator would hide what a later one takes.

On the CPU the peak is that of the resident set, which Linux keeps (VmHWM) and lets a process reset.
It counts everything: tensors, buffers of the GEMM library, the allocator's own losses. On CUDA it
is the peak of what torch's allocator has handed out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import problems
import providers
import torch

import dgl_ext

FUSION = "concat"
# Rows and classes of the step that comes before: enough for the GEMM library to load its code and
# to make the buffers that it keeps, so that these are not taken for the measured step's.
WARM_UP = (512, 1024)
RESET_PEAK = "5"  # what /proc/PID/clear_refs takes to set VmHWM to the resident set

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Request:
    """What to measure."""

    provider: str
    rows: int
    width: int
    classes: int
    device: str
    dtype: str
    workspace_limit: int  # bytes
    seconds: float  # how long to time; one step is always timed


def peak_extra(step: Callable[[], object], device: torch.device) -> int:
    """Run a step; returns how many bytes more than before it there were at its peak.

    Raises:
        providers.Unavailable: this system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_free_memory()
    try:
        (_PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError as error:
        raise providers.Unavailable(f"needs Linux's /proc/self/clear_refs: {error}") from error
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _give_back_free_memory() -> None:
    """Make the allocator return what was freed, or the step could use it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise providers.Unavailable(f"/proc/self/status has no {field}")


def measure(request: Request) -> dict[str, Any]:
    """Build the problem, measure the peak of one step, then time further ones.

    Returns:
        `extra_bytes`, `gradient_bytes` (a part of them), and `microseconds` of each timed step.
    """
    dgl_ext.set_workspace_limit(request.workspace_limit)
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    provider = providers.PROVIDERS[providers.STEP][request.provider]

    def problem_of(rows: int, classes: int) -> problems.Problem:
        return problems.make_problem(FUSION, rows, request.width, classes, device, dtype)

    provider.build(problem_of(*WARM_UP))()
    problem = problem_of(request.rows, request.classes)
    step = provider.build(problem)
    extra = peak_extra(step, device)
    gradients = [leaf.grad for leaf in problem.leaves().values()]
    return {
        "extra_bytes": extra,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients if gradient is not None),
        "microseconds": harness.time_alone(step, device, request.seconds),
    }


def main() -> None:
    """Answer the request in the first argument."""
    request = Request(**json.loads(sys.argv[1]))
    try:
        answer = {"status": "ok", "note": ""} | measure(request)
    except providers.Unavailable as reason:
        answer = {"status": "left out", "note": str(reason)}
    except Exception as error:  # the parent reports it and goes on
        answer = {"status": "failed", "note": providers.reason(error)}
    print(json.dumps(answer))


def command(request: Request) -> list[str]:
    """How to start this file with a request."""
    return [sys.executable, __file__, json.dumps(asdict(request))]


if __name__ == "__main__":
    main()

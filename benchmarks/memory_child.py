"""One provider at one size of the memory benchmark, in a process of its own.

`bench_memory.py` starts it with a request as JSON and reads one line of JSON. A process of its own,
because what an earlier step left in the allocator would hide what a later one takes.
`peak_memory.py` says what a peak is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import harness
import problems
import providers
import torch
from peak_memory import peak_extra

import dgl_ext

FUSION = "concat"
# Rows and classes of the step that comes before: enough for the GEMM library to load its code and
# to make the buffers that it keeps, so that these are not taken for the measured step's.
WARM_UP = (512, 1024)


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

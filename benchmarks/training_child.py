"""The peak memory of one provider's training step, in a process of its own.

`bench_training.py` starts it with a request as JSON and reads one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import training_steps
from peak_memory import ALLOCATOR, peak_extra
from providers import Unavailable, reason

WARM_UP = 3  # steps; the first ones make what is kept
TIMEOUT = 1800  # seconds


@dataclass(frozen=True)
class Request:
    """What to measure."""

    provider: str
    network: str
    fusion: str
    batch: int
    device: str
    dtype: str
    threads: int
    repetitions: int


def measure(request: Request) -> list[int]:
    """The bytes that each of some steps takes at its peak: activations, gradients, buffers."""
    torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    training = training_steps.Training(
        request.network, request.fusion, request.batch, device, getattr(torch, request.dtype)
    )
    step = training_steps.PROVIDERS[request.provider](training)
    for _ in range(WARM_UP):
        step()
    peaks = []
    for _ in range(request.repetitions):
        training.optimizer.zero_grad()  # or the old gradients would hide the new ones
        peaks.append(peak_extra(step, device))
    return peaks


def ask(request: Request) -> dict[str, Any]:
    """Start a process and measure there.

    Returns:
        `peaks`, or `note`, why there are none.
    """
    command = [sys.executable, __file__, json.dumps(asdict(request))]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same dgl_ext as here
    done = subprocess.run(
        command,
        env=os.environ | ALLOCATOR | path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"note": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Answer the request in the first argument."""
    try:
        answer: dict[str, Any] = {"peaks": measure(Request(**json.loads(sys.argv[1])))}
    except Unavailable as why:
        answer = {"note": str(why)}
    except Exception as error:  # the parent reports it and goes on
        answer = {"note": reason(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

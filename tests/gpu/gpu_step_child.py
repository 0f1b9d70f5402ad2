"""Training steps on a GPU that need a process of their own: `test_gpu_step_streams.py` starts it.

    python tests/gpu/gpu_step_child.py out_of_range HEAD BACKEND VALUE
    python tests/gpu/gpu_step_child.py grids

A device-side assertion leaves a process without a usable GPU, and DGL_EXT_MAX_CTAS is read once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a script
from support.problems import assert_same, loss_gradients, make_problem, make_target

import dgl_ext
from dgl_ext._arguments.heads import HEADS
from dgl_ext.types import DecoupledLoss

DEVICE = "cuda"
KERNELS = "fused"
SIZE = {"leading": (256,), "widths": (256, 384), "classes": 128}
CLASSES = 3  # of the problem with a target out of range


def out_of_range(head: str, backend: str, value: str) -> None:
    """A target of this value, first as the one to ignore, which is fine, and then as a class."""
    problem = make_problem(head, leading=(40,), classes=CLASSES, dtype=torch.float32).to(DEVICE)
    target = make_target(problem)
    target[23] = int(value)

    def step(**options: int) -> DecoupledLoss:
        return problem.step(
            dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options
        )

    print("ignored:", step(ignore_index=int(value)).total.isfinite().item(), flush=True)
    try:
        print("not noticed:", step().total.item(), flush=True)
    except RuntimeError as error:
        print("raised:", str(error).splitlines()[0], flush=True)


def grids() -> None:
    """Right results, and by head how many CTAs each kernel of a step and its backward had."""
    found = {}
    for head in HEADS:
        problem = make_problem(head, **SIZE)
        target = make_target(problem)
        results = []
        for backend, moved in (("reference", problem), (KERNELS, problem.to(DEVICE))):
            loss = moved.step(
                dgl_ext.fused_decouple_cross_entropy,
                target.to(moved.features[0].device),
                backend=backend,
            )
            grads = loss_gradients(loss, moved, 3.0)
            results.append({"total": loss.total.detach(), **grads})
        assert_same({name: t.cpu() for name, t in results[1].items()}, results[0], 1e-11)
        found[head] = count_ctas(problem.to(torch.float32).to(DEVICE), target.to(DEVICE))
    print(json.dumps(found), flush=True)


def count_ctas(problem, target) -> list[int]:
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=KERNELS)
    scale = torch.full_like(loss.total, 3.0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=KERNELS)
        loss.total.backward(scale)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["grid"][0] for event in events if event.get("cat") == "kernel"]


if __name__ == "__main__":
    {"out_of_range": out_of_range, "grids": grids}[sys.argv[1]](*sys.argv[2:])

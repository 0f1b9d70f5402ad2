"""Small passes and training steps of every head in every dtype, for compute-sanitizer to watch.

    compute-sanitizer --tool racecheck python tests/gpu/gpu_sanitizer_cases.py

Nothing but copies to the device and this project's kernels runs there: a sanitizer is slow, and
the rest is not ours. Values are compared in `test_gpu*.py`; here they must only be there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a script
from support.problems import (
    Problem,
    flat,
    gradients,
    make_present,
    make_problem,
    make_target,
    random_tensor,
)

import dgl_ext
from dgl_ext._arguments.heads import HEADS

DEVICE = "cuda"
BACKENDS = ("fused", "library")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Aligned: vector copies, whole tiles. Ragged: element copies, ends in every direction. Both have
# several tiles, and rows enough that the backward pass sums over more than one block.
SIZES = {
    "aligned": {"leading": (64,), "widths": (64, 64), "classes": 32},
    "ragged": {"leading": (37,), "widths": (35, 19), "classes": 33},
}
LEAKS = ((0.0, 0.0), (0.5, 0.25))
LOGITS, WHOLE, CHUNKED = "logits", "step", "chunked masked step"  # kinds of passes


@dataclass(frozen=True)
class Case:
    fusion: str
    dtype: torch.dtype
    size: str
    tf32: bool
    kind: str
    leaks: tuple[float, float]
    backend: str

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{self.backend} {self.kind} of {self.fusion} {dtype} {self.size} leaks {self.leaks}"


def cases() -> Iterator[Case]:
    """Every head, dtype and size; float32 once more as tf32, which only aligned operands can be.

    Logits with the leaks closed and open; steps whole with them closed, in chunks with them open.
    The library executor with them open only: its kernels are the same, its products cuBLAS's.
    """
    passes = [(LOGITS, leaks) for leaks in LEAKS]
    passes += zip((WHOLE, CHUNKED), LEAKS, strict=True)
    for fusion in HEADS:
        for dtype in DTYPES:
            for size in SIZES:
                both = dtype == torch.float32 and size == "aligned"
                for tf32 in (False, True) if both else (False,):
                    for kind, leaks in passes:
                        for backend in BACKENDS[: 2 if any(leaks) else 1]:
                            yield Case(fusion, dtype, size, tf32, kind, leaks, backend)


def few_cases() -> Iterator[Case]:
    """What racecheck, which is slow, gets through: every kernel of both executors once.

    All that there are in bfloat16, and of the other tiles the one launch that has every phase.
    """
    for case in cases():
        here = any(case.leaks) and (case.size == "ragged" or case.tf32)
        every_phase = case.kind == CHUNKED and case.backend == BACKENDS[0]
        if here and (case.dtype == torch.bfloat16 or every_phase):
            yield case


def run(case: Case) -> None:
    """One forward and backward pass; raises where a result is missing or not finite."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    drawn = make_problem(case.fusion, dtype=case.dtype, **SIZES[case.size])
    for tensor in (pass_through if case.kind == LOGITS else step)(case, drawn):
        if tensor is None or not tensor.detach().cpu().isfinite().all():
            raise AssertionError(f"{case}: a result is missing or not finite")


def pass_through(case: Case, drawn: Problem) -> list[torch.Tensor | None]:
    """Logits, and gradients of random ones of theirs."""
    problem = drawn.to(DEVICE)
    logits = problem.call(
        dgl_ext.fused_decouple,
        backend=case.backend,
        encoder_leak=case.leaks[0],
        head_leak=case.leaks[1],
    )
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        random_tensor(z.shape, generator, dtype=case.dtype).to(DEVICE) for z in flat(logits)
    ]
    return [*flat(logits), *gradients(logits, problem, cotangents).values()]


def step(case: Case, drawn: Problem) -> list[torch.Tensor | None]:
    """Losses, hits, and gradients that had to be scaled; with a limit of one byte, tile by tile."""
    problem, target = drawn.to(DEVICE), make_target(drawn, ignored=0.2).to(DEVICE)
    masks = [mask.to(DEVICE) for mask in make_present(drawn)] if case.kind == CHUNKED else None
    before = dgl_ext.workspace_limit()
    dgl_ext.set_workspace_limit(1 if case.kind == CHUNKED else before)
    try:
        loss = problem.step(
            dgl_ext.fused_decouple_cross_entropy,
            target,
            alpha=(2.0, 0.5),
            label_smoothing=0.1,
            present=masks,
            backend=case.backend,
            encoder_leak=case.leaks[0],
            head_leak=case.leaks[1],
        )
    finally:
        dgl_ext.set_workspace_limit(before)
    scale = torch.tensor(3.0, dtype=loss.total.dtype).to(DEVICE)
    grads = torch.autograd.grad(loss.total, [tensor for _, tensor in problem.named()], scale)
    return [loss.total, loss.fused, *loss.unimodal, loss.correct, *grads]


def main() -> int:
    """Run all; the last line says how many there were."""
    count = 0
    for case in few_cases() if "--few" in sys.argv[1:] else cases():
        print(case, flush=True)
        run(case)
        count += 1
    print(f"{count} sanitizer cases done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

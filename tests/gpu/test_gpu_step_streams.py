"""The training step on a GPU: launches, streams, graphs, memory, a host that must not wait.

Compared bitwise with the same call as `test_gpu_step.py` checks it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.problems import loss_gradients, make_present, make_problem, make_target
from test_gpu import (
    ALIGNED,
    DEVICE,
    DTYPES,
    KERNELS,
    RAGGED,
    assert_bitwise,
    dtypes,
    heads,
    on_device,
    reason_to_skip,
    sizes,
)
from test_gpu_step import MIXED, TINY, WHOLE, Results, evaluate, executors, limits, workspace
from test_gpu_streams import (
    OTHER_SEED,
    check_current_stream,
    check_streams_at_once,
    copies,
    device_work,
    host_waits,
)
from torch import Tensor

import dgl_ext
from dgl_ext.types import DecoupledLoss

_REASON = reason_to_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON)]

CHILD = Path(__file__).with_name("gpu_step_child.py")
MIB = 2**20


class Step:
    """A training step on inputs that stay where they are, as a CUDA graph needs them."""

    def __init__(self, head: str, dtype: torch.dtype, size: dict, *, mixed: bool = True) -> None:
        self._options = {"dtype": dtype, **size}
        self._loss = MIXED if mixed else {}
        self._head = head
        problem, target, present = self._draw(0)
        self.problem = problem.map(on_device)
        self.target = on_device(target)
        self.present = tuple(map(on_device, present)) if mixed else None

    def _draw(self, seed: int):
        problem = make_problem(self._head, seed=seed, **self._options)
        target = make_target(problem, ignored=0.2, seed=seed + 100)
        return problem, target, make_present(problem, seed=seed + 200)

    def forward(self, backend: str = KERNELS) -> DecoupledLoss:
        return self.problem.step(
            dgl_ext.fused_decouple_cross_entropy,
            self.target,
            backend=backend,
            present=self.present,
            **self._loss,
        )

    def __call__(self, backend: str = KERNELS) -> Results:
        loss = self.forward(backend)
        parts = {f"unimodal[{i}]": part for i, part in enumerate(loss.unimodal)}
        named = {"total": loss.total.detach(), "fused": loss.fused, **parts}
        return named | {"correct": loss.correct, **loss_gradients(loss, self.problem, 3.0)}

    def clear(self) -> None:
        for _, tensor in self.problem.named():
            tensor.grad = None

    def inputs(self) -> list[Tensor]:
        return [*(t for _, t in self.problem.named()), self.target, *(self.present or ())]

    def other_values(self, seed: int) -> list[Tensor]:
        """New values for the inputs, already on the device."""
        problem, target, present = self._draw(seed)
        masks = present if self.present else ()
        drawn = [*(t.detach() for _, t in problem.named()), target, *masks]
        return [tensor.to(DEVICE) for tensor in drawn]

    def fill(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.inputs(), values, strict=True):
                tensor.copy_(value)


# --- launches ---


def assert_is_step(work: list[str]) -> None:
    assert len(work) == 1, work
    assert "head_kernel" in work[0], work
    assert "Step" in work[0], work


def assert_is_scaling(work: list[str]) -> None:
    assert len(work) == 1, work
    assert "scale_kernel" in work[0], work


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mixed", "limit"), [(False, WHOLE), (True, TINY)], ids=["plain", "mixed chunked"]
)
@heads
def test_losses_and_all_gradients_are_one_kernel(head, dtype, mixed, limit):
    """In backward one more, which scales; autograd itself fills in the 1 that it starts from."""
    with workspace(limit):
        step = Step(head, dtype, ALIGNED, mixed=mixed)
        step()  # what is done once per process or size is not counted
        losses = [step.forward(), step.forward()]
        assert_is_step(device_work(lambda: losses.append(step.forward())))
        plain, given, kept = (loss.total for loss in losses)
        one = torch.ones_like(plain)
        step.clear()
        assert_is_scaling(device_work(lambda: given.backward(one)))
        step.clear()
        assert_is_scaling(device_work(lambda: kept.backward(one, retain_graph=True)))
        step.clear()
        backward = device_work(plain.backward)
        assert_is_scaling([name for name in backward if "scale_kernel" in name])
        assert len(backward) == 2, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eight_modalities_are_one_kernel_and_one_that_scales(dtype):
    size = {"leading": (40,), "widths": (9, 16, 1, 40, 7, 8, 3, 33), "classes": 11}
    problem = make_problem("sum", dtype=dtype, **size).map(on_device)
    target, kept = make_target(problem), []

    def forward():
        kept.append(problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=KERNELS))

    forward()
    assert_is_step(device_work(forward))
    one = torch.ones_like(kept[1].total)
    assert_is_scaling(device_work(lambda: kept[1].total.backward(one)))
    assert all(tensor.grad is not None for _, tensor in problem.named())


@dtypes
@limits
@heads
def test_evaluation_is_one_kernel(head, dtype, limit):
    step = Step(head, dtype, ALIGNED)
    with workspace(limit), torch.no_grad():
        step.forward()
        assert_is_step(device_work(step.forward))


@heads
def test_the_profiler_counts_more_for_other_backends(head):
    """Were nothing counted, the tests above would not know one kernel from ten."""
    step = Step(head, torch.float32, ALIGNED)
    for backend in ("reference", "library"):
        step(backend)
        assert len(device_work(lambda: step.forward(backend))) > 3  # noqa: B023 (called here)


@pytest.mark.parametrize("widths", [(64, 64), (64, 40)], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@heads
def test_the_library_executor_is_a_handful_of_launches(head, dtype, widths):
    step = Step(head, dtype, ALIGNED | {"widths": widths}, mixed=False)
    step("library")
    work = device_work(lambda: step.forward("library"))
    # a product that cuBLAS splits over k is still one product
    work = [name for name in work if "splitK" not in name]
    at_most = 10 if head == "film" else 6 if widths[0] == widths[1] else 8
    assert len(work) <= at_most, work


@dtypes
@heads
def test_the_backward_of_a_loss_launches_nothing(head, dtype):
    """But for float16, whose gradients have waited in float32 to be rounded."""
    step = Step(head, dtype, ALIGNED)
    step.forward().backward()  # makes the one that is kept
    step.clear()
    loss = step.forward()
    work = device_work(loss.backward)
    assert len(work) == (1 if dtype == torch.float16 else 0), work


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `gpu_step_child.py` with the package that is under test here."""
    path = [str(Path(dgl_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    return subprocess.run(
        [sys.executable, str(CHILD), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_bound_on_the_grid_holds_for_steps_and_scaling(monkeypatch):
    monkeypatch.delenv("DGL_EXT_MAX_CTAS", raising=False)
    bound = 3
    free, bounded = child("grids"), child("grids", DGL_EXT_MAX_CTAS=str(bound))
    assert free.returncode == bounded.returncode == 0, free.stderr + bounded.stderr
    for head, grids in json.loads(bounded.stdout.splitlines()[-1]).items():
        others = json.loads(free.stdout.splitlines()[-1])[head]
        assert len(grids) == len(others) == 2, head
        assert max(grids) <= bound < min(others), head


@pytest.mark.parametrize(
    ("head", "backend", "value"),
    [("concat", KERNELS, "3"), ("film", KERNELS, "-1"), ("sum", "library", "3")],
)
def test_a_target_out_of_range_is_a_device_side_assertion(head, backend, value):
    done = child("out_of_range", head, backend, value)
    assert "ignored: True" in done.stdout, done.stderr
    assert "device-side assert triggered" in done.stdout.partition("raised: ")[2], done.stdout
    if backend == KERNELS:
        assert "target in [0, classes)" in done.stderr


# --- streams and graphs ---


@executors
@dtypes
@heads
def test_the_host_does_not_wait(head, backend, dtype, limit):
    step = Step(head, dtype, RAGGED)

    def all_of_it():
        step(backend)
        step.forward(backend).backward()
        step.forward(backend).total.backward()
        with torch.no_grad():
            step.forward(backend)

    with workspace(limit):
        all_of_it()
        assert not host_waits(all_of_it)


@dtypes
@heads
def test_work_goes_to_the_current_stream(head, dtype):
    check_current_stream(Step(head, dtype, RAGGED), "total")


@heads
def test_two_streams_at_once(head):
    """Each launch needs all its CTAs on the GPU together, and two are under way."""
    check_streams_at_once([Step(head, torch.float32, size) for size in (ALIGNED, RAGGED)])


class Training:
    """Step, backward and an SGD step of a module, its inputs and parameters in place."""

    def __init__(self, head: str, dtype: torch.dtype, size: dict, backend: str) -> None:
        torch.manual_seed(0)
        module = dgl_ext.nn.MODULES[head](size["widths"], size["classes"], backend=backend)
        self.module = module.to(DEVICE, dtype)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.data = Step(head, dtype, size)

    def __call__(self) -> Results:
        features = self.data.problem.features
        for tensor in (*features, *self.module.parameters()):
            tensor.grad = None
        loss = self.module.cross_entropy(
            *features, target=self.data.target, present=self.data.present, alpha=(2.0, 0.5)
        )
        loss.total.backward()
        self.optimizer.step()
        results = {"total": loss.total.detach(), "correct": loss.correct}
        return results | {f"features[{i}]": h.grad for i, h in enumerate(features)}

    def parameters(self) -> Results:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def reset(self, values: Results) -> None:
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(values[name])


def capture(function: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """The function as a graph, and the memory that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
        gc.collect()  # no node of an earlier step may live on
        with torch.cuda.graph(graph, stream=side):
            static = function()
    torch.cuda.current_stream().wait_stream(side)
    return graph, static


@sizes
@dtypes
@executors
@heads
def test_a_cuda_graph_of_step_backward_and_optimizer_trains_on_new_inputs(
    head, backend, limit, dtype, size
):
    with workspace(limit):
        loop = Training(head, dtype, size, backend)
        start = loop.parameters()
        inputs = [loop.data.other_values(OTHER_SEED + i) for i in range(3)]
        graph, static = capture(loop)
        loop.reset(start)
        replayed = []
        for values in inputs:
            loop.data.fill(values)
            graph.replay()
            replayed.append(copies(static) | loop.parameters())
        loop.reset(start)
        for values, found in zip(inputs, replayed, strict=True):
            loop.data.fill(values)
            assert_bitwise(found, loop() | loop.parameters())
    assert not torch.equal(replayed[0]["total"], replayed[1]["total"])
    for name, value in start.items():
        assert not torch.equal(value, replayed[-1][name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("backend", [KERNELS, "library", "auto"])
@heads
def test_a_second_device_while_the_first_is_current(head, backend):
    problem = make_problem(head, **RAGGED)
    target, present = make_target(problem, ignored=0.2), make_present(problem)
    expected = evaluate(problem.map(on_device), target, backend, 3.0, present=present)
    moved = problem.map(lambda tensor: on_device(tensor, "cuda:1"))
    found = evaluate(moved, target, backend, 3.0, present=present)
    assert torch.cuda.current_device() == 0
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


# --- memory ---

# Three branches of 128 MiB in float32; a chunk of one large tile of rows fits 16 MiB.
TALL = {"leading": (16384,), "widths": (64, 64), "classes": 2048}


def peak(function: Callable[[], object]) -> int:
    """Bytes that the allocator was asked for at most, beyond those of before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    function()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def beside_the_workspace(step: Step) -> int:
    """Gradients, and in 16 bits what they are summed in: parameters', or in float16 all."""
    dtype = step.problem.features[0].dtype
    every = sum(tensor.numel() for _, tensor in step.problem.named())
    of_features = sum(h.numel() for h in step.problem.features)
    wide = {torch.float16: every, torch.bfloat16: every - of_features}
    return every * dtype.itemsize + 4 * wide.get(dtype, 0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("limit", [16 * MIB, WHOLE], ids=["16 MiB", "default"])
@heads
def test_memory_stays_within_gradients_and_workspace(head, dtype, mixed, limit):
    step = Step(head, dtype, TALL, mixed=mixed)
    Step(head, dtype, ALIGNED)()
    with workspace(limit):
        bound = dgl_ext.workspace_limit() or 512 * MIB
        found = peak(lambda: step.forward().total.backward())
        step.clear()
        with torch.no_grad():
            evaluated = peak(step.forward)
    grads = beside_the_workspace(step)
    assert sum(tensor.nbytes for _, tensor in step.problem.named()) < found
    assert found <= grads + bound + MIB
    assert evaluated <= bound + MIB


@heads
def test_memory_of_library_gemms_stays_near_that_and_the_reference_far(head):
    step = Step(head, torch.float32, TALL)
    found = {}
    for backend in ("library", "reference"):
        step(backend)  # the library's own buffers
        step.clear()
        found[backend] = peak(lambda: step.forward(backend).total.backward())  # noqa: B023
        step.clear()
    # Products before they are added, and where the library takes its buffers anew.
    bound = 3 * beside_the_workspace(step) + (dgl_ext.workspace_limit() or 512 * MIB) + 40 * MIB
    assert found["library"] <= bound
    assert found["reference"] > bound

"""The CUDA kernels under launches counted, streams, graphs, a host that must not wait, two GPUs.

Compared bitwise with the same call as `test_gpu.py` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.problems import Problem, flat, gradients, make_problem
from test_gpu import (
    ALIGNED,
    DEVICE,
    DTYPES,
    KERNELS,
    RAGGED,
    assert_bitwise,
    check,
    draw_cotangents,
    dtypes,
    evaluate,
    heads,
    on_device,
    reason_to_skip,
)
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dgl_ext

_REASON = reason_to_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON)]

SLEEP_CYCLES = 500_000_000  # a fraction of a second on any GPU
OTHER_SEED = 7


class Step:
    """Forward and backward on inputs that stay where they are, as a CUDA graph needs them."""

    def __init__(self, head: str, dtype: torch.dtype, size: dict) -> None:
        self._options = {"dtype": dtype, **size}
        self.problem = make_problem(head, **self._options).map(on_device)
        self._cotangents = [on_device(g) for g in draw_cotangents(self.problem)]
        self.forward()

    def forward(self):
        return self.problem.call(dgl_ext.fused_decouple, backend=KERNELS)

    def backward(self, logits) -> dict[str, Tensor | None]:
        return gradients(logits, self.problem, self._cotangents)

    def __call__(self) -> dict[str, Tensor | None]:
        logits = self.forward()
        named = {f"logits[{i}]": z.detach() for i, z in enumerate(flat(logits))}
        return named | self.backward(logits)

    def other_values(self, seed: int) -> list[Tensor]:
        """New values for the inputs, already on the device."""
        other = make_problem(self.problem.fusion, seed=seed, **self._options)
        return [tensor.detach().to(DEVICE) for _, tensor in other.named()]

    def fill(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for (_, tensor), value in zip(self.problem.named(), values, strict=True):
                tensor.copy_(value)


def copies(results: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.clone() for name, t in results.items()}


def device_work(function: Callable[[], object]) -> list[str]:
    """The names of everything that the function has the GPU do, copies and fills included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
@heads
def test_forward_and_backward_are_one_kernel_each(head, dtype, requires_grad):
    step = Step(head, dtype, ALIGNED)
    step()  # what is done once per process or size is not counted
    if not requires_grad:
        for _, tensor in step.problem.named():
            tensor.requires_grad_(False)
    kept = []
    forward = device_work(lambda: kept.append(step.forward()))
    assert len(forward) == 1, forward
    assert "head_kernel" in forward[0]
    if requires_grad:
        backward = device_work(lambda: step.backward(kept[0]))
        assert len(backward) == 1, backward
        assert "head_kernel" in backward[0]


@heads
def test_the_profiler_counts_more_for_the_reference(head):
    """Were nothing counted, the test above would not know one kernel from ten."""
    problem = make_problem(head, dtype=torch.float32, **ALIGNED).map(on_device)

    def call():
        return problem.call(dgl_ext.fused_decouple, backend="reference")

    call()
    assert len(device_work(call)) > 1


@pytest.mark.parametrize("size", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@dtypes
@heads
def test_a_cuda_graph_replays_on_new_values(head, dtype, size):
    step = Step(head, dtype, size)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for seed in (OTHER_SEED, OTHER_SEED + 1):
        step.fill(step.other_values(seed))
        graph.replay()
        replayed = copies(static)
        assert_bitwise(replayed, step())
        graph.replay()
        assert_bitwise(static, replayed)


def check_current_stream(step: Any, name: str) -> None:
    """The side stream's inputs come late; the default stream, which is idle, would see old ones.

    `step` has `fill` and `other_values`, and returns results by name, among them `name`.
    """
    old = copies(step())
    values = step.other_values(OTHER_SEED)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        step.fill(values)
        found = copies(step())
    side.synchronize()
    found = {key: t.cpu() for key, t in found.items()}
    torch.cuda.current_stream().wait_stream(side)
    assert_bitwise(found, {key: t.cpu() for key, t in step().items()})
    assert not torch.equal(found[name], old[name].cpu())


def check_streams_at_once(steps: Sequence[Any]) -> None:
    """Every step on a stream of its own, again and again, gives what it gives alone."""
    expected = [copies(step()) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step())
        torch.cuda.synchronize()
        for results, truth in zip(found, expected, strict=True):
            assert_bitwise(results, truth)


@dtypes
@heads
def test_work_goes_to_the_current_stream(head, dtype):
    check_current_stream(Step(head, dtype, RAGGED), "logits[0]")


@heads
def test_two_streams_at_once(head):
    check_streams_at_once([Step(head, torch.float32, size) for size in (ALIGNED, RAGGED)])


def host_waits(function: Callable[[], object]) -> bool:
    """Whether the GPU, put to sleep first, was awake every time when the function was done.

    Three tries: beside other test processes, a host may be held up for longer than the sleep. What
    torch itself knows to wait raises at once.
    """
    for _ in range(3):
        torch.cuda.synchronize()
        asleep = torch.cuda.Event()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(SLEEP_CYCLES)
            asleep.record()
            function()
            waited = asleep.query()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        if not waited:
            return False
    return True


@dtypes
@heads
def test_the_host_does_not_wait(head, dtype):
    step = Step(head, dtype, RAGGED)
    step()
    assert not host_waits(step)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("backend", [KERNELS, "library", "auto"])
@heads
def test_a_second_device_while_the_first_is_current(head, backend):
    problem = make_problem(head, **RAGGED)
    cotangents = draw_cotangents(problem)
    expected = evaluate(problem.map(on_device), backend, cotangents)
    moved: Problem = problem.map(lambda tensor: on_device(tensor, "cuda:1"))
    assert moved.call(dgl_ext.fused_decouple, backend=backend).fused.device.index == 1
    found = evaluate(moved, backend, cotangents)
    assert torch.cuda.current_device() == 0
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    check(backend, problem)

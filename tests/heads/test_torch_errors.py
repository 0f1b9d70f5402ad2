"""Errors of PyTorch pass as they are, ours are said in the user's terms, and no call runs twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.problems import make_problem, make_target

import dgl_ext
from dgl_ext._ops import extension as _extension
from dgl_ext._ops import library as _ops

pytestmark = pytest.mark.skipif(not _extension.available(), reason="needs the C++ extension")

# A head whose logits do not fit the memory that the process may have: 40,000 x 50,000 floats.
STARVED = """
import resource, torch, dgl_ext
torch.set_num_threads(1)
x, y = (torch.randn(40_000, 8) for _ in range(2))
classes, target = 50_000, torch.randint(50_000, (40_000,))
dgl_ext.set_workspace_limit(2**40)
resource.setrlimit(resource.RLIMIT_AS, (5 * 2**30,) * 2)
try:
    dgl_ext.{call}
except RuntimeError as error:
    print(error)
"""
# the call, the bytes that it asks for
STARVED_CALLS = {
    "concat": ("fused_decouple((x, y), torch.randn(classes, 16))", 8_000_000_000),
    "sum": (
        "fused_decouple((x, y), [torch.randn(classes, 8)] * 2, fusion='sum')",
        8_000_000_000,
    ),
    "film": (  # all three logits at once
        "fused_decouple((x, y), [torch.randn(16, 8), torch.randn(classes, 8)], fusion='film')",
        24_000_000_000,
    ),
    "step": (
        "fused_decouple_cross_entropy((x, y), torch.randn(classes, 16), target)",
        24_000_000_000,
    ),
    "step of film": (
        "fused_decouple_cross_entropy((x, y), [torch.randn(16, 8), torch.randn(classes, 8)],"
        " target, fusion='film')",
        24_000_000_000,
    ),
}


@pytest.mark.parametrize("name", STARVED_CALLS)
def test_out_of_memory_as_torch_says_it(name):
    """Batch-size finders look for these words."""
    call, size = STARVED_CALLS[name]
    code = STARVED.format(call=call)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "DefaultCPUAllocator: can't allocate memory" in run.stdout, run.stdout + run.stderr
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # hands its message on
        assert f"you tried to allocate {size} bytes" in run.stdout
        assert "API call" not in run.stdout


@pytest.fixture
def failing(monkeypatch):
    """Has an op raise an error; returns how often it was called."""
    calls: list[str] = []

    def fail(op: str, message: str) -> list[str]:
        def instead(*args):
            calls.append(op)
            raise RuntimeError(message)

        monkeypatch.setitem(_ops._overloads, op, instead)
        return calls

    return fail


CALLS = {
    "linear_head_forward": lambda p: p.call(dgl_ext.fused_decouple),
    "linear_head_step": lambda p: p.step(
        dgl_ext.fused_decouple_cross_entropy, make_target(p, seed=5)
    ),
    "film_head_forward": lambda p: p.call(dgl_ext.fused_decouple),
    "film_head_step": lambda p: p.step(
        dgl_ext.fused_decouple_cross_entropy, make_target(p, seed=6)
    ),
}
MESSAGES = {
    "CUDA error: an illegal memory access was encountered": RuntimeError,
    "CUDA out of memory. Tried to allocate 7.00 GiB.": torch.OutOfMemoryError,
    "dgl_ext::some_op: launching: CUDA error 700": RuntimeError,
}


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("op", CALLS)
def test_a_failing_op_runs_once(op, message, failing):
    problem = make_problem("film" if op.startswith("film") else "concat", dtype=torch.float32)
    calls = failing(op, message)
    with pytest.raises(RuntimeError) as raised:
        CALLS[op](problem)
    assert str(raised.value) == message
    assert type(raised.value) is MESSAGES[message]
    assert calls == [op]


@pytest.mark.parametrize("op", [op for op in CALLS if op.endswith("forward")])
def test_a_failing_backward_raises_the_same(op, failing):
    problem = make_problem("film" if op.startswith("film") else "concat", dtype=torch.float32)
    logits = CALLS[op](problem)
    calls = failing(op.replace("forward", "backward"), "CUDA out of memory. Tried to allocate 1 B")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1 B"):
        logits.fused.backward(torch.rand_like(logits.fused))
    assert len(calls) == 1


def test_what_only_an_op_can_see_is_its_own_error():
    problem = make_problem("sum", dtype=torch.float32)
    target = torch.full(problem.features[0].shape[:-1], 17)
    with pytest.raises(RuntimeError, match=r"dgl_ext::linear_head_step: target: .* got 17"):
        problem.step(dgl_ext.fused_decouple_cross_entropy, target)

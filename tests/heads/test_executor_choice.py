"""Which executor a call gets: by backend, device, GPU, and whether the extension is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.problems import COMPILED_BACKENDS, make_problem, make_target

import dgl_ext
from dgl_ext import functional
from dgl_ext._ops import extension as _extension
from dgl_ext._ops import library as _ops
from dgl_ext._ops.library import Executor


def on_gpu(index=0):
    """What the choice looks at of a feature on a GPU; this machine may have none."""
    device = torch.device("cuda", index)
    return SimpleNamespace(device=device, is_cpu=False, is_cuda=True, get_device=lambda: index)


def head_on(like):
    """Features, weights and biases, as the choice takes them."""
    return (like,), (), ()


def arrange(like):
    head = SimpleNamespace(unpack_if_plain=lambda *_: head_on(like))
    return functional._unpack_if_plain("auto", head, None, None, None, None)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, the second too old, and the indices that were asked about."""
    asked = []

    def capability(index):
        asked.append(index)
        return ((8, 0), (7, 5))[index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(_extension, "_errors", {"cpu": None, "cuda": None})
    monkeypatch.setattr(functional, "LIBRARY_DEVICES", frozenset({"cuda"}))
    functional._has_kernels.cache_clear()
    yield asked
    functional._has_kernels.cache_clear()


def test_a_gpu_too_old_takes_the_reference_and_is_asked_once(gpus):
    for _ in range(2):
        assert functional._choose_executor("auto", head_on(on_gpu(0))) is Executor.AUTO
        assert functional._choose_executor("auto", head_on(on_gpu(1))) is None
        assert arrange(on_gpu(0)) is not None
        assert arrange(on_gpu(1)) is None
    assert gpus == [0, 1]


def test_names_become_executors(gpus):
    for name, executor in (("fused", Executor.FUSED), ("library", Executor.LIBRARY)):
        assert functional._choose_executor(name, head_on(on_gpu(0))) is executor
    assert functional._choose_executor("reference", head_on(on_gpu(0))) is None


def test_without_the_cuda_extension_auto_warns_and_names_raise(gpus, monkeypatch):
    error = ImportError("no CUDA here")
    monkeypatch.setattr(_extension, "_errors", {"cpu": None, "cuda": error})
    assert arrange(on_gpu(0)) is None
    with pytest.warns(RuntimeWarning, match="slower reference: no CUDA here"):
        assert functional._choose_executor("auto", head_on(on_gpu(0))) is None
    for name in ("fused", "library"):
        with pytest.raises(RuntimeError, match="CUDA extension of dgl_ext is not loaded"):
            functional._choose_executor(name, head_on(on_gpu(0)))


def test_the_library_is_for_cuda(fusion, monkeypatch):
    monkeypatch.setattr(functional, "LIBRARY_DEVICES", frozenset({"cuda"}))
    problem = make_problem(fusion)
    message = '^backend: "library" needs features on a CUDA device, got cpu$'
    with pytest.raises(ValueError, match=message):
        problem.call(dgl_ext.fused_decouple, backend="library")
    with pytest.raises(ValueError, match=message):
        problem.step(dgl_ext.fused_decouple_cross_entropy, make_target(problem), backend="library")


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_the_executor_reaches_every_op(fusion, backend, monkeypatch):
    reached = {}
    for name, op in list(_ops._overloads.items()):

        def spy(*args, op=op, name=name):
            reached[name] = args[-1]
            return op(*args)

        monkeypatch.setitem(_ops._overloads, name, spy)
    problem = make_problem(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    logits.fused.backward(torch.randn_like(logits.fused))
    problem.step(dgl_ext.fused_decouple_cross_entropy, make_target(problem), backend=backend)
    head = "film_head" if fusion == "film" else "linear_head"
    wanted = Executor[backend.upper()]
    assert reached == {f"{head}_{part}": wanted for part in ("forward", "backward", "step")}

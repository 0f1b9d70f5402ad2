"""The package without PyTorch's private names, one at a time: the public stand-ins do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.problems import (
    assert_same,
    cotangents_like,
    gradients,
    make_problem,
    make_target,
)

import dgl_ext
from dgl_ext import _torch_private

PACKAGE = Path(dgl_ext.__file__).parent


def computed(fusion: str) -> dict[str, torch.Tensor | None]:
    """Logits, loss and gradients, of a graph that is kept once and then freed."""
    problem = make_problem(fusion, seed=12)
    leaves = dict(problem.named())
    logits = problem.call(dgl_ext.fused_decouple, head_leak=0.5)
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, make_target(problem))
    grads = {
        "logits": gradients(logits, problem, cotangents_like(logits)).values(),
        "kept": torch.autograd.grad(loss.total, list(leaves.values()), retain_graph=True),
        "freed": torch.autograd.grad(loss.total, list(leaves.values()), torch.tensor(3.0).double()),
    }
    named = {
        f"{kind} {name}": None if grad is None else grad.clone()
        for kind, values in grads.items()
        for name, grad in zip(leaves, values, strict=True)
    }
    return {"total": loss.total, "fused": logits.fused, **named}


@pytest.mark.parametrize("name", _torch_private.FALLBACKS)
def test_all_is_computed_without(name, fusion, monkeypatch):
    expected = computed(fusion)
    monkeypatch.setattr(_torch_private, name, _torch_private.FALLBACKS[name])
    assert_same(computed(fusion), expected, 1e-13)


def test_a_name_that_is_gone():
    fallback = object()
    found = [
        _torch_private._resolve("gone", path, fallback)
        for path in (
            "torch._C._no_such_name",
            "torch._no_such_module.name",
            "torch._C._autograd:no",
        )
    ]
    del _torch_private.FALLBACKS["gone"]
    assert found == [fallback] * 3


def test_the_stand_in_answers_as_what_it_stands_in_for():
    tree = ([torch.zeros(2), 1], (2, None))
    for function in (_torch_private.tree_map, _torch_private.FALLBACKS["tree_map"]):
        assert function(type, tree) == ([torch.Tensor, int], (int, type(None)))


def test_private_names_are_in_one_module():
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name != "_torch_private.py":
            found = re.findall(r"torch(?:\.\w+)*\.(?:_C\b|_[a-z]\w*)", path.read_text())
            assert not found, (path.name, found)

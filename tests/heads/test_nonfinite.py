"""Infinite and NaN gradients from above, as under GradScaler; rows that have no part in them."""

from __future__ import annotations

import pytest
import torch
from support.problems import (
    BACKENDS,
    assert_same,
    cotangents_like,
    gradients,
    loss_gradients,
    make_present,
    make_problem,
    make_target,
)

import dgl_ext

ROWS = 9
VALUES = [float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step(fusion, backend, value, dtype, reduction):
    problem = make_problem(fusion, leading=(ROWS,), dtype=dtype, seed=3)
    present = make_present(problem, share=0.5)
    target = make_target(problem, ignored=0.4)
    loss = problem.step(
        dgl_ext.fused_decouple_cross_entropy,
        target,
        present=present,
        reduction=reduction,
        backend=backend,
    )
    found = loss_gradients(loss, problem, upstream=value)
    for i, mask in enumerate(present):
        rows = found[f"features[{i}]"]
        counts = mask & (target != -100)
        assert 0 < counts.sum() < ROWS
        assert not rows[~counts].any()
        assert not rows[counts].isfinite().any()
    for name, grad in found.items():
        if not name.startswith("features"):
            assert not grad.isfinite().any(), name


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_zero_stays_zero_whichever_way_a_step_is_scaled(fusion, value, kept):
    problem = make_problem(fusion, leading=(ROWS,), dtype=torch.float32)
    target = make_target(problem, ignored=0.5, seed=8)
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target)
    loss.total.backward(torch.tensor(value), retain_graph=kept)
    for feature in problem.features:
        assert not feature.grad[target == -100].any()
        assert not feature.grad[target != -100].isfinite().any()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_absent_rows(fusion, backend, value):
    """What reaches an absent row's own logits goes nowhere, whatever it is."""
    problem = make_problem(fusion, leading=(ROWS,), seed=5)
    present = make_present(problem, share=0.5, seed=4)
    found = {}
    for upstream in (0.0, value):
        logits = problem.call(dgl_ext.fused_decouple, present=present, backend=backend)
        fused, *unimodal = cotangents_like(logits)
        for i, mask in enumerate(present):
            unimodal[i] = unimodal[i].masked_fill(~mask[:, None], upstream)
        found[upstream] = gradients(logits, problem, (fused, *unimodal))
    assert_same(found[value], found[0.0])

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


@pytest.mark.parametrize("arrives", ["own", "fused"])
@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_branch_without_gradient_meets_no_infinity(fusion, backend, modality, arrives):
    """An infinite feature whose own logits get no gradient: what does not see it stays finite.

    That is more than a gradient of zeros does, since zero times infinity is NaN.
    """
    if arrives == "fused" and fusion == "film":
        pytest.skip("FiLM's fused logits carry either feature into every gradient")
    problem = make_problem(fusion, leading=(ROWS,), seed=5)
    with torch.no_grad():
        problem.features[modality][2] = float("inf")
    options = {"encoder_leak": 0.5, "head_leak": 0.25, "backend": backend}
    logits = problem.call(dgl_ext.fused_decouple, **options)
    cotangents = list(cotangents_like(logits))
    cotangents[modality + 1] = None
    if arrives == "own":
        cotangents[0] = None
    found = gradients(logits, problem, cotangents)
    seen = {f"weight[{modality}]"} if arrives == "fused" else set()  # g^T h_i
    for name, grad in found.items():
        if arrives == "fused" and fusion == "concat" and name == "weight[0]":
            begin = 0 if modality == 0 else problem.features[0].shape[1]
            others = torch.ones(grad.shape[1], dtype=torch.bool)
            others[begin : begin + problem.features[modality].shape[1]] = False
            assert grad[:, others].isfinite().all()
        elif grad is not None and name not in seen:
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arrives", [{1}, {1, 2}])
def test_gamma_hears_nothing_from_infinite_x_alone(backend, arrives):
    """x alone is beta(x): its logits send nothing to the rows of W_f that make gamma."""
    problem = make_problem("film", leading=(ROWS,), seed=5)
    with torch.no_grad():
        problem.features[0][2] = float("inf")
    logits = problem.call(dgl_ext.fused_decouple, head_leak=0.25, backend=backend)
    cotangents = [c if i in arrives else None for i, c in enumerate(cotangents_like(logits))]
    gamma, beta = gradients(logits, problem, cotangents)["weight[0]"].chunk(2)
    assert not gamma.any()
    assert not beta.isfinite().any()

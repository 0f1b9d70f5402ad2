"""The training step in float32, bfloat16 and float16, by the two-reference rule, and autocast."""

from __future__ import annotations

import pytest
import torch
from support.problems import (
    COMPILED_BACKENDS,
    UPSTREAM,
    assert_no_less_exact,
    assert_same,
    assert_two_references,
    loss_gradients,
    make_present,
    make_problem,
    make_target,
)
from support.two_pass import named_loss

import dgl_ext
from dgl_ext._ops import library as _ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A gradient scaler's factor and a micro-batch's. In float16 a gradient of 1/3 per 400 rows is near
# the smallest numbers there are, and one scaled by 65536 near the largest.


def results(problem, target, backend, upstream, **options):
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options)
    losses = named_loss(loss.total, loss.fused, loss.unimodal)
    return {**losses, **loss_gradients(loss, problem, upstream)}


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@pytest.mark.parametrize(
    ("leading", "widths", "classes"),
    [((64,), (96, 64), 6), ((33,), (128, 31), 70), ((400,), (32, 48), 10)],
)
def test_no_less_exact_than_the_same_dtype_composition(
    fusion, backend, dtype, upstream, leaks, leading, widths, classes
):
    problem = make_problem(fusion, leading=leading, widths=widths, classes=classes, dtype=dtype)
    target = make_target(problem, ignored=0.1)
    options = {
        "encoder_leak": leaks[0],
        "head_leak": leaks[1],
        "label_smoothing": 0.1,
        "alpha": (2.0, 0.5),
        "present": make_present(problem, share=0.8),
    }
    truth = results(problem.to(torch.float64), target, "reference", upstream, **options)
    composition = results(problem, target, "reference", upstream, **options)
    actual = results(problem, target, backend, upstream, **options)
    for name, value in actual.items():
        assert value.dtype == (dtype if name in dict(problem.named()) else torch.float32), name
    assert_no_less_exact(actual, composition, truth, dtype)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_float16_gradients_do_not_underflow_before_they_are_scaled(fusion, backend):
    """A million rows: 1/n times a residual has two digits left in float16."""
    problem = make_problem(fusion, leading=(1_000_000,), widths=(4, 3), dtype=torch.float16)
    target = make_target(problem)
    truth = results(problem.to(torch.float64), target, "reference", 65536.0)
    actual = results(problem, target, backend, 65536.0)
    for i in range(2):
        exact = truth[f"features[{i}]"]
        error = (actual[f"features[{i}]"].double() - exact).abs().max()
        assert error <= 2**-8 * exact.abs().max()


def test_float16_gradients_are_scaled_and_rounded_in_one_pass(fusion, monkeypatch):
    """Autograd would round float32 ones, too, but each in a pass of its own."""
    problem = make_problem(fusion, dtype=torch.float16)
    dtypes = set()

    def spy(*args):
        results = original(*args)
        dtypes.update(result.dtype for result in results)
        return results

    original = _ops.scale_gradients
    monkeypatch.setattr(_ops, "scale_gradients", spy)
    results(problem, make_target(problem), "fused", 65536.0)
    assert dtypes == {torch.float16}


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
    def test_against_the_reference_under_autocast(self, fusion, dtype, upstream):
        problem = make_problem(fusion, leading=(48,), widths=(64, 33), classes=10)
        problem = problem.to(torch.float32)
        target = make_target(problem)
        exact = problem.map(lambda tensor: tensor.to(dtype).double())
        truth = results(exact, target, "reference", upstream)
        with torch.autocast("cpu", dtype):
            composition = results(problem, target, "reference", upstream)
            actual = results(problem, target, "fused", upstream)
        assert {value.dtype for value in actual.values()} == {torch.float32}
        # Gradients come back in float32, rounded to the autocast dtype on their way.
        names = dict(problem.named())
        rounded, composition = (
            {name: value.to(dtype) if name in names else value for name, value in result.items()}
            for result in (actual, composition)
        )
        assert_two_references(rounded, composition, truth)

    def test_losses_are_float32_and_float64_stays(self, fusion):
        problem = make_problem(fusion)
        target = make_target(problem)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(problem, target, "fused", 1.0)
        assert_same(found, results(problem, target, "reference", 1.0), 1e-11)

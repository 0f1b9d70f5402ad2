"""float32, bfloat16 and float16 by the two-reference rule, and autocast."""

from __future__ import annotations

import pytest
import torch
from support.problems import (
    COMPILED_BACKENDS,
    assert_same,
    assert_two_references,
    cotangents_like,
    flat,
    gradients,
    make_problem,
)
from support.two_pass import named_logits

import dgl_ext

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(problem, cotangents, backend: str, **options):
    logits = problem.call(dgl_ext.fused_decouple, backend=backend, **options)
    cotangents = [g.to(z.dtype) for g, z in zip(cotangents, flat(logits), strict=True)]
    return {**named_logits(logits), **gradients(logits, problem, cotangents)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@pytest.mark.parametrize(
    ("leading", "widths", "classes"),
    [((64,), (96, 64), 6), ((33,), (128, 31), 70), ((3, 7), (17, 5), 3), ((400,), (32, 48), 10)],
)
def test_no_less_exact_than_the_same_dtype_composition(
    fusion, dtype, leaks, leading, widths, classes
):
    problem = make_problem(fusion, leading=leading, widths=widths, classes=classes, dtype=dtype)
    options = dict(zip(("encoder_leak", "head_leak"), leaks, strict=True))
    cotangents = cotangents_like(problem.call(dgl_ext.fused_decouple))
    exact = problem.to(torch.float64)
    truth = results(exact, cotangents, "reference", **options)
    composition = results(problem, cotangents, "reference", **options)
    # In float32 the sums of up to three products (an open leak's) are rounded in between.
    roundings = 3 if dtype == torch.float32 else 1
    for backend in COMPILED_BACKENDS:
        actual = results(problem, cotangents, backend, **options)
        assert_two_references(actual, composition, truth, roundings)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_outputs_and_gradients_have_the_dtype_of_their_inputs(fusion, dtype):
    problem = make_problem(fusion, dtype=dtype)
    values = results(problem, cotangents_like(problem.call(dgl_ext.fused_decouple)), "fused")
    assert {value.dtype for value in values.values()} == {dtype}


def test_bias_gradients_over_many_rows_do_not_lose_bits(fusion):
    """A float32 running sum over 200,000 rows would be off in the fourth digit."""
    problem = make_problem(
        fusion, leading=(200_000,), widths=(2, 2), classes=1, dtype=torch.float32
    )
    logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    grad = torch.rand(logits.fused.shape) + 1
    (found,) = torch.autograd.grad(logits.fused, problem.biases[-1], grad)
    assert abs(found.double() / grad.double().sum() - 1).item() < 1e-7


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_no_less_exact_than_the_reference_under_autocast(self, fusion, dtype):
        problem = make_problem(
            fusion, leading=(48,), widths=(64, 32), classes=10, dtype=torch.float32
        )
        cotangents = cotangents_like(problem.call(dgl_ext.fused_decouple))
        # What autocast computes is the problem rounded to its dtype; that is the truth to compare
        # with, since the rounding of the inputs is the same for both.
        exact = problem.to(dtype).to(torch.float64)
        cotangents = [g.to(dtype).double() for g in cotangents]
        truth = results(exact, cotangents, "reference")
        with torch.autocast("cpu", dtype):
            composition = results(problem, cotangents, "reference")
            actual = results(problem, cotangents, "fused")
        for name, value in actual.items():
            expected = dtype if name.startswith(("fused", "unimodal")) else torch.float32
            assert value.dtype == expected, name
        # Gradients come back in float32, rounded to the autocast dtype on their way.
        rounded = {name: value.to(dtype) for name, value in actual.items()}
        composition_rounded = {name: value.to(dtype) for name, value in composition.items()}
        assert_two_references(rounded, composition_rounded, truth)

    def test_mixed_inputs_are_cast_as_for_linear(self):
        problem = make_problem("concat", dtype=torch.float32)
        halved = (problem.features[0].detach().bfloat16(), problem.features[1].detach())
        with torch.autocast("cpu", torch.bfloat16):
            logits = dgl_ext.fused_decouple(halved, problem.weight, problem.bias)
        assert logits.fused.dtype == torch.bfloat16

    def test_float64_stays_float64(self, fusion):
        problem = make_problem(fusion)
        with torch.autocast("cpu", torch.bfloat16):
            logits = problem.call(dgl_ext.fused_decouple, backend="fused")
        assert_same(named_logits(logits), named_logits(problem.call(dgl_ext.fused_decouple)))

    def test_disabled_inside(self):
        problem = make_problem("sum", dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert problem.call(dgl_ext.fused_decouple).fused.dtype == torch.float32

"""Missing modalities: rows of which the head is told that they lack one."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.problems import (
    COMPILED_BACKENDS,
    LAYOUTS,
    assert_same,
    assert_two_references,
    cotangents_like,
    gradients,
    make_present,
    make_problem,
)
from support.two_pass import named_logits

import dgl_ext
from dgl_ext._arguments.heads import HEADS

LEAKS = [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)]


def results(problem, backend, present, cotangents=None, **leaks):
    """Logits and gradients by name."""
    logits = problem.call(dgl_ext.fused_decouple, backend=backend, present=present, **leaks)
    grads = gradients(logits, problem, cotangents or cotangents_like(logits))
    return {**named_logits(logits), **grads}


def check(problem, backend, present, **leaks):
    found = results(problem, backend, present, **leaks)
    assert_same(found, results(problem, "reference", present, **leaks))
    return found


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize(("encoder_leak", "head_leak"), LEAKS)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(fusion, backend, encoder_leak, head_leak, bias):
    problem = make_problem(fusion, leading=(5, 9), bias=bias)
    present = make_present(problem)
    check(problem, backend, present, encoder_leak=encoder_leak, head_leak=head_leak)


@pytest.mark.parametrize("backend", ["reference", *COMPILED_BACKENDS])
def test_absent_is_the_same_as_a_feature_of_zeros(fusion, backend):
    """All but that an absent row's feature gets no gradient."""
    problem = make_problem(fusion, leading=(11,))
    present = make_present(problem)
    zeroed = problem.to(torch.float64)
    with torch.no_grad():
        for h, mask in zip(zeroed.features, present, strict=True):
            h[~mask] = 0
    found, expected = results(problem, backend, present), results(zeroed, backend, None)
    for i, mask in enumerate(present):
        grad = expected[f"features[{i}]"]
        expected[f"features[{i}]"] = grad.masked_fill(~mask.unsqueeze(-1), 0.0)
    assert_same(found, expected)


@pytest.mark.parametrize("backend", ["reference", *COMPILED_BACKENDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_absent_row_is_not_read(fusion, backend, value):
    problem = make_problem(fusion, leading=(12,))
    present = make_present(problem)
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25}
    expected = results(problem, backend, present, **leaks)
    with torch.no_grad():
        for h, mask in zip(problem.features, present, strict=True):
            h[~mask] = value
    assert_same(results(problem, backend, present, **leaks), expected, 0.0)
    for i, mask in enumerate(present):
        assert not expected[f"features[{i}]"][~mask].any()
        assert expected[f"features[{i}]"][mask].any()


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_any_strides(fusion, backend, layout):
    problem = make_problem(fusion, leading=(6, 4), layout=layout)
    present = tuple(mask.t().contiguous().t() for mask in make_present(problem))
    check(problem, backend, present)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("where", ["first", "second", "all there", "all absent"])
def test_which_masks_there_are(fusion, backend, where):
    problem = make_problem(fusion, leading=(8,))
    one, other = make_present(problem)
    present = {
        "first": (one, None),
        "second": (None, other),
        "all there": (torch.ones_like(one), torch.ones_like(one)),
        "all absent": (torch.zeros_like(one), None),
    }[where]
    check(problem, backend, present, encoder_leak=0.5, head_leak=0.5)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("modalities", [1, 3, 8])
def test_numbers_of_modalities(fusion, backend, modalities):
    if modalities not in HEADS[fusion].modalities:
        pytest.skip(f"{fusion} does not take {modalities}")
    problem = make_problem(fusion, leading=(9,), widths=range(2, 2 + modalities))
    check(problem, backend, make_present(problem), head_leak=0.5)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (), (1,)], ids=str)
def test_few_rows(fusion, backend, leading):
    problem = make_problem(fusion, leading=leading)
    check(problem, backend, make_present(problem))


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_every_subset_of_losses_and_of_requires_grad(fusion, backend):
    problem = make_problem(fusion, leading=(3,), widths=(2, 3), classes=2)
    present = make_present(problem)
    tensors = [tensor for _, tensor in problem.named()]
    for needed in itertools.product((False, True), repeat=len(tensors)):
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.requires_grad_(need)
        logits = problem.call(dgl_ext.fused_decouple)
        for used in ((True, False, False), (False, True, True)):
            cotangents = [
                g if use else None for g, use in zip(cotangents_like(logits), used, strict=True)
            ]
            found, expected = (
                results(problem, b, present, cotangents, encoder_leak=0.5)
                for b in (backend, "reference")
            )
            assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_the_same_dtype_composition(fusion, dtype):
    problem = make_problem(fusion, leading=(48,), widths=(64, 33), classes=10, dtype=dtype)
    present = make_present(problem)
    truth, composition, actual = (
        results(p, backend, present)
        for p, backend in (
            (problem.to(torch.float64), "reference"),
            (problem, "reference"),
            (problem, "fused"),
        )
    )
    assert_two_references(actual, composition, truth)


def test_under_compile(fusion):
    problem = make_problem(fusion, dtype=torch.float32)
    present = make_present(problem)

    def call():
        return problem.call(dgl_ext.fused_decouple, present=present)

    torch._dynamo.reset()
    compiled, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(), call()
    assert_same(named_logits(compiled), named_logits(eager), 1e-6)
    cotangents = cotangents_like(eager)
    assert_same(
        gradients(compiled, problem, cotangents), gradients(eager, problem, cotangents), 1e-6
    )

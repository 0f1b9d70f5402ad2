"""Every backend computes what the two-pass recipe computes, in float64 to 1e-12."""

from __future__ import annotations

import pytest
import torch
from support.grids import one_axis_at_a_time
from support.problems import (
    BACKENDS,
    LAYOUTS,
    assert_same,
    cotangents_like,
    flat,
    gradients,
    make_problem,
)
from support.two_pass import named_logits, plain_head, plain_unimodal, two_pass

import dgl_ext
from dgl_ext._arguments.heads import HEADS

WIDTHS = {
    1: (5,),
    2: (5, 4),
    3: (1, 6, 3),
    4: (2, 2, 2, 2),
    5: (3, 1, 4, 1, 5),
    6: (1, 2, 3, 4, 5, 6),
    7: (7, 6, 5, 4, 3, 2, 1),
    8: (2, 3, 5, 7, 1, 3, 2, 4),
}


def modalities(fusion: str) -> list[int]:
    return [count for count in WIDTHS if count in HEADS[fusion].modalities]


def heads_and_modalities() -> list[tuple[str, int]]:
    return [(fusion, count) for fusion in HEADS for count in modalities(fusion)]


def check_against_two_pass(backend: str, cotangent_layout: str = "contiguous", **options) -> None:
    problem = make_problem(**options)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    cotangents = cotangents_like(logits, layout=cotangent_layout)
    expected_logits, expected_grads = two_pass(problem, cotangents)
    assert_same(named_logits(logits), named_logits(expected_logits))
    assert_same(gradients(logits, problem, cotangents), expected_grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("head", "count"), heads_and_modalities())
def test_equals_two_pass_recipe_for_every_number_of_modalities(backend, head, count):
    check_against_two_pass(backend, fusion=head, widths=WIDTHS[count], leading=(9,))


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(
    leading=[(33,), (), (1,), (3, 7), (2, 3, 4), (257,)], classes=[6, 1, 64, 65, 131]
)
def test_equals_two_pass_recipe_for_every_shape(fusion, backend, leading, classes):
    check_against_two_pass(backend, fusion=fusion, widths=(13, 7), leading=leading, classes=classes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@one_axis_at_a_time(leading=[(3, 5), (6,), (2, 3, 4)], classes=[4, 70])
def test_equals_two_pass_recipe_for_every_layout(fusion, backend, layout, leading, classes):
    check_against_two_pass(
        backend,
        layout,
        fusion=fusion,
        layout=layout,
        leading=leading,
        classes=classes,
        widths=(6, 9),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_two_pass_recipe_without_biases(fusion, backend):
    check_against_two_pass(backend, fusion=fusion, bias=False)


def test_a_permuted_batch_that_no_row_stride_reaches(fusion):
    problem = make_problem(fusion, leading=(4, 5, 6))
    moved = problem.to(torch.float64)
    moved.features = tuple(
        h.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_()
        for h in problem.features
    )
    assert not moved.features[0].is_contiguous()
    logits, expected = (p.call(dgl_ext.fused_decouple) for p in (moved, problem))
    cotangents = cotangents_like(logits)
    assert_same(named_logits(logits), named_logits(expected))
    assert_same(gradients(logits, moved, cotangents), gradients(expected, problem, cotangents))


@one_axis_at_a_time(
    leaks=[(0.5, 0.25), (0, 0), (0, 0.25), (0.5, 0), (1, 0), (0, 1), (1, 1)], bias=[True, False]
)
def test_leaks_agree_between_backends(fusion, leaks, bias):
    encoder_leak, head_leak = leaks
    widths = (4, 6) if 3 not in HEADS[fusion].modalities else (4, 6, 3)
    problem = make_problem(fusion, widths=widths, leading=(5, 3), bias=bias)
    options = {"encoder_leak": encoder_leak, "head_leak": head_leak}
    results = []
    for backend in BACKENDS:
        logits = problem.call(dgl_ext.fused_decouple, backend=backend, **options)
        grads = gradients(logits, problem, cotangents_like(logits))
        results.append({**named_logits(logits), **grads})
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_leaks_are_plain_autograd(fusion, backend):
    problem = make_problem(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend, encoder_leak=1, head_leak=1)
    cotangents = cotangents_like(logits)
    plain = [plain_head(problem, problem.features)]
    plain += [plain_unimodal(problem, i) for i in range(len(problem.features))]
    assert_same(dict(enumerate(flat(logits))), dict(enumerate(plain)))
    named = dict(problem.named())
    expected = torch.autograd.grad(plain, list(named.values()), cotangents)
    assert_same(gradients(logits, problem, cotangents), dict(zip(named, expected, strict=True)))


@pytest.mark.parametrize("encoder_leak", [0.0, 0.3])
@pytest.mark.parametrize("head_leak", [0.0, 0.7])
def test_a_leak_mixes_the_two_gradients_linearly(fusion, encoder_leak, head_leak):
    """grad = closed + leak * (open - closed), entry by entry, for the encoders and for the head."""
    problem = make_problem(fusion)

    def grads(rho_e, rho_h):
        logits = problem.call(
            dgl_ext.fused_decouple, backend="fused", encoder_leak=rho_e, head_leak=rho_h
        )
        return gradients(logits, problem, cotangents_like(logits))

    closed, opened, mixed = grads(0, 0), grads(1, 1), grads(encoder_leak, head_leak)
    expected = {}
    for name in closed:
        leak = encoder_leak if name.startswith("features") else head_leak
        expected[name] = closed[name] + leak * (opened[name] - closed[name])
    assert_same(mixed, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_like_any_other_op(fusion, backend):
    """Two backward passes add up in .grad; gradient accumulation needs nothing special."""
    problem = make_problem(fusion)
    once = {}
    for repeat in (1, 2):
        logits = problem.call(dgl_ext.fused_decouple, backend=backend)
        torch.autograd.backward(flat(logits), cotangents_like(logits))
        grads = {name: tensor.grad.clone() for name, tensor in problem.named()}
        if repeat == 1:
            once = grads
    assert_same(grads, {name: 2 * grad for name, grad in once.items()})


def test_same_input_gives_same_bits(fusion):
    problem = make_problem(fusion, leading=(65,), widths=(33, 17), classes=7, dtype=torch.float32)
    results = []
    for _ in range(3):
        logits = problem.call(dgl_ext.fused_decouple, backend="fused")
        grads = gradients(logits, problem, cotangents_like(logits))
        results.append([*flat(logits), *grads.values()])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))

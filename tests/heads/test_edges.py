"""Empty and minimal sizes, non-finite rows, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from support.grids import one_axis_at_a_time
from support.problems import BACKENDS, assert_same, cotangents_like, flat, gradients, make_problem
from support.two_pass import named_logits, two_pass

import dgl_ext


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(
    leading=[(1,), (0,), (0, 5), (4, 0), (1, 1), ()],
    sizes=[((5, 4), 3), ((1, 1), 1), ((0, 4), 3), ((5, 4), 0)],
)
def test_empty_and_minimal_sizes(fusion, backend, leading, sizes):
    widths, classes = sizes
    problem = make_problem(fusion, leading=leading, widths=widths, classes=classes)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    assert all(z.shape == (*leading, classes) for z in flat(logits))
    cotangents = cotangents_like(logits)
    expected_logits, expected_grads = two_pass(problem, cotangents)
    assert_same(named_logits(logits), named_logits(expected_logits))
    assert_same(gradients(logits, problem, cotangents), expected_grads)


def test_an_empty_batch_gives_zero_parameter_gradients(fusion):
    problem = make_problem(fusion, leading=(0,))
    logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    for name, grad in gradients(logits, problem, cotangents_like(logits)).items():
        assert grad.shape == dict(problem.named())[name].shape
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_devices_without_a_kernel_take_the_reference(fusion):
    problem = make_problem(fusion).to("meta")
    logits = problem.call(dgl_ext.fused_decouple)
    assert {z.device.type for z in flat(logits)} == {"meta"}


def test_no_grad_gives_logits_only(fusion):
    problem = make_problem(fusion)
    with torch.no_grad():
        logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    assert not any(z.requires_grad for z in flat(logits))
    assert_same(named_logits(logits), named_logits(two_pass(problem)[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_poisons_itself_and_the_sums_that_hold_it(fusion, value):
    """As in PyTorch: the same entries are NaN, all others have their finite values."""
    problem = make_problem(fusion, leading=(6,))
    with torch.no_grad():
        problem.features[1][2, 1] = value
    results = []
    for backend in BACKENDS:
        logits = problem.call(dgl_ext.fused_decouple, backend=backend)
        grads = gradients(logits, problem, cotangents_like(logits))
        results.append({**named_logits(logits), **grads})
    rows = torch.arange(6) != 2
    for result in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(result[name].isfinite(), expected.isfinite()), name
        assert_same(
            *({n: t.nan_to_num(0, 0, 0) for n, t in r.items()} for r in (result, results[0]))
        )
        assert all(z[rows].isfinite().all() for z in result.values() if z.shape[0] == 6)


def test_gradients_of_a_single_expanded_scalar(fusion):
    """What `.sum()` and `.mean()` send back: a cotangent of stride 0."""
    problem = make_problem(fusion)
    results = []
    for backend in BACKENDS:
        logits = problem.call(dgl_ext.fused_decouple, backend=backend)
        cotangents = [torch.tensor(0.3, dtype=z.dtype).expand_as(z) for z in flat(logits)]
        results.append(gradients(logits, problem, cotangents))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """8.6 GB of features: offsets need 64 bits. The last rows are checked against float64."""
    width, rows = 512, 2**22 + 3
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(rows, width)
    x.copy_(torch.randn(width, generator=generator).expand(rows, width))
    x[-3:] = torch.randn(3, width, generator=generator)
    x.requires_grad_()
    y = torch.randn(rows, 1, generator=generator)
    weight = torch.randn(1, width + 1, generator=generator)
    logits = dgl_ext.fused_decouple((x, y), weight, backend="fused")
    grad = torch.randn(rows, 1, generator=generator)
    logits.unimodal[0].backward(grad)
    last = x.detach()[-3:].double() @ weight[:, :width].double().T
    torch.testing.assert_close(
        logits.unimodal[0].detach()[-3:].double(), last, rtol=1e-4, atol=1e-4
    )
    expected = grad[-3:].double() @ weight[:, :width].double()
    torch.testing.assert_close(x.grad[-3:].double(), expected, rtol=1e-5, atol=1e-5)

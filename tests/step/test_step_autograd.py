"""The training step under autograd: scaling, repetition, and what needs a gradient."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from support.problems import (
    BACKENDS,
    assert_same,
    head_arguments,
    loss_gradients,
    make_problem,
    make_target,
)
from support.two_pass import named_loss

import dgl_ext
from dgl_ext._ops import library as _ops


def call(problem, target, backend="fused", **options):
    return problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options)


def drawn(fusion, **options):
    problem = make_problem(fusion, **{"leading": (9,), **options})
    return problem, make_target(problem)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("upstream", [65536.0, 1 / 3, 1.0, 0.0, -2.0])
def test_the_gradient_of_the_total_scales_all_gradients(fusion, backend, upstream):
    problem, target = drawn(fusion)
    found, expected = (
        loss_gradients(call(problem, target, b), problem, upstream) for b in (backend, "reference")
    )
    assert_same(found, expected, 1e-11 * max(1.0, abs(upstream)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_total_among_other_losses(fusion, backend):
    """A scaler's product, a division by the number of micro-batches, another term, in place."""
    problem, target = drawn(fusion)
    named = dict(problem.named())
    plain = torch.autograd.grad(call(problem, target, "reference").total, list(named.values()))
    total = call(problem, target, backend).total
    total /= 4
    total += named["weight[0]"].square().sum() * 0.5
    found = torch.autograd.grad(total * 8, list(named.values()))
    for (name, tensor), grad, once in zip(named.items(), found, plain, strict=True):
        expected = 2 * once + (8 * tensor if name == "weight[0]" else 0)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.5), (0.0, 3.0), (1.0, 3.0)], ids=str)
def test_retain_graph_allows_a_second_backward(fusion, backend, scales):
    problem, target = drawn(fusion)
    expected = loss_gradients(call(problem, target, "reference"), problem)
    total = call(problem, target, backend).total
    (total * scales[0]).backward(retain_graph=True)
    (total * scales[1]).backward()
    for name, tensor in problem.named():
        torch.testing.assert_close(tensor.grad, sum(scales) * expected[name])
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_over_micro_batches(fusion, backend):
    """Four micro-batches, each divided by their number, add up to the whole batch."""
    problem, target = drawn(fusion, leading=(12,))
    expected = loss_gradients(call(problem, target, "reference"), problem)
    parts = [make_problem(fusion, leading=(3,)) for _ in range(4)]
    for i, part in enumerate(parts):
        rows = slice(3 * i, 3 * i + 3)
        part.features = tuple(h.detach()[rows].requires_grad_() for h in problem.features)
        part.weights, part.biases = problem.weights, problem.biases
        (call(part, target[rows], backend).total / 4).backward()
    for name, tensor in problem.named():
        if not name.startswith("features"):
            torch.testing.assert_close(tensor.grad, expected[name])
    for j in range(2):
        grads = torch.cat([part.features[j].grad for part in parts])
        torch.testing.assert_close(grads, expected[f"features[{j}]"])


def test_grad_takes_the_step_s_own_memory(fusion, monkeypatch):
    """No copy is made on the way to `.grad`."""
    problem, target = drawn(fusion, dtype=torch.float32)
    kept = []

    def spy(*args):
        results = original(*args)
        kept.extend(result.data_ptr() for result in results)
        return results

    original = _ops.call
    monkeypatch.setattr(_ops, "call", spy)
    call(problem, target).total.backward()
    assert all(tensor.grad.data_ptr() in kept for _, tensor in problem.named())


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_requires_grad_agrees_with_the_reference(fusion, leaks, bias):
    problem, target = drawn(fusion, leading=(3,), widths=(2, 3), classes=2, bias=bias)
    tensors = [tensor for _, tensor in problem.named()]
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        results = []
        for backend in BACKENDS:
            loss = call(problem, target, backend, encoder_leak=leaks[0], head_leak=leaks[1])
            assert loss.total.requires_grad == any(wanted)
            losses = named_loss(loss.total, loss.fused, loss.unimodal)
            results.append({**losses, "correct": loss.correct, **loss_gradients(loss, problem)})
        for found in results[1:]:
            assert_same(found, results[0], 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_total_is_differentiable(fusion, backend):
    problem, target = drawn(fusion)
    loss = call(problem, target, backend)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in (loss.fused, *loss.unimodal, loss.correct))
    assert loss.total.shape == loss.fused.shape == ()


def test_no_grad_computes_losses_only(fusion, monkeypatch):
    problem, target = drawn(fusion)
    expected = call(problem, target, "reference")
    counts = []

    def spy(*args):
        results = original(*args)
        counts.append(len(results))
        return results

    original = _ops.call
    monkeypatch.setattr(_ops, "call", spy)
    with torch.no_grad():
        loss = call(problem, target)
    assert counts == [6]  # the loss and what comes with it
    assert not loss.total.requires_grad
    for found, wanted in zip(loss, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_second_derivative_raises_and_is_never_zero(fusion):
    problem, target = drawn(fusion)
    total = call(problem, target).total
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(total, problem.weights[0], create_graph=True)


def test_torch_func_transforms_take_the_reference(fusion):
    problem, target = drawn(fusion, requires_grad=False)

    def loss(x, y):
        problem.features = (x, y)
        return problem.step(dgl_ext.fused_decouple_cross_entropy, target).total

    x, y = problem.features
    found = torch.func.grad(loss, argnums=(0, 1))(x, y)
    problem.features = (x.requires_grad_(), y.requires_grad_())
    expected = loss_gradients(call(problem, target), problem)
    torch.testing.assert_close(found[0], expected["features[0]"])
    torch.testing.assert_close(found[1], expected["features[1]"])


def test_inputs_are_not_changed(fusion):
    problem, target = drawn(fusion)
    before = {name: tensor.detach().clone() for name, tensor in problem.named()}
    wanted = target.clone()
    (call(problem, target).total * 3).backward()
    assert torch.equal(target, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.named())


class TestModule:
    @pytest.mark.parametrize("options", [{}, {"encoder_leak": 0.5, "head_leak": 0.25}], ids=str)
    def test_cross_entropy_calls_the_function(self, fusion, options):
        module = dgl_ext.nn.MODULES[fusion]((6, 4), 3, **options)
        features = torch.randn(5, 6), torch.randn(5, 4)
        target = torch.tensor([0, 2, -1, 1, 0])
        settings = {
            "alpha": (2.0, 0.5),
            "reduction": "sum",
            "ignore_index": -1,
            "label_smoothing": 0.1,
            "present": (torch.tensor([True, True, True, False, True]), None),
        }
        weight, bias = head_arguments(module)
        expected = dgl_ext.fused_decouple_cross_entropy(
            features,
            weight,
            target,
            bias=bias,
            fusion=fusion,
            **settings,
            **{**options, "backend": "reference"},
        )
        found = module.cross_entropy(*features, target=target, **settings)
        parameters = list(module.parameters())
        for a, b in zip(
            torch.autograd.grad(found.total, parameters),
            torch.autograd.grad(expected.total, parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(found.total, expected.total)
        assert torch.equal(found.correct, expected.correct)


@pytest.mark.parametrize("keeps", [False, True])
def test_threads_that_share_a_step(fusion, keeps, monkeypatch):
    """Another thread comes in the middle of one's backward, and at most one of the two frees."""
    problem = make_problem(fusion, leading=(64,), dtype=torch.float32)
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, make_target(problem))
    leaves, scale = [tensor for _, tensor in problem.named()], torch.tensor(3.0)
    expected = [g.clone() for g in torch.autograd.grad(loss.total, leaves, scale, True)]
    results: dict[bool, object] = {}

    def differentiate(keep: bool) -> None:
        try:
            results[keep] = torch.autograd.grad(loss.total, leaves, scale, retain_graph=keep)
        except RuntimeError as error:
            results[keep] = error

    other = threading.Thread(target=differentiate, args=(not keeps,))
    name = "scale_gradients" if keeps else "scale_gradients_"
    scaled = getattr(_ops, name)

    def interrupted(grads, *arguments, **options):
        monkeypatch.undo()
        if keeps:
            other.start()
            other.join(0.3)
        result = scaled(grads, *arguments, **options)
        if not keeps:
            other.start()
            other.join(0.3)
        return result

    monkeypatch.setattr(_ops, name, interrupted)
    differentiate(keeps)
    other.join(10)
    assert not isinstance(results[keeps], RuntimeError)
    late = results[not keeps]
    assert isinstance(late, RuntimeError) is not keeps
    for found in (results[keeps], late if keeps else expected):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6)

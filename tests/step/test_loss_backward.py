"""`DecoupledLoss.backward()`: what `total.backward()` gives, with nothing but the step."""

from __future__ import annotations

import threading

import pytest
import torch
from support.problems import BACKENDS, COMPILED_BACKENDS, make_problem, make_target
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dgl_ext
from dgl_ext import types
from dgl_ext._ops import library as _ops
from dgl_ext.nn import MODULES


def drawn(fusion, **options):
    problem = make_problem(fusion, **{"leading": (9,), **options})
    return problem, make_target(problem)


def step(problem, target, backend="fused", **options):
    return problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options)


def grads(problem):
    """Takes every `.grad`, and leaves none."""
    found = {name: tensor.grad for name, tensor in problem.named()}
    for _, tensor in problem.named():
        tensor.grad = None
    return found


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def scalings(monkeypatch):
    """The names of the ops that scale, as they are called."""
    called = []
    for name in ("scale_gradients", "scale_gradients_"):
        op = getattr(_ops, name)
        monkeypatch.setattr(
            _ops, name, lambda *args, op=op, name=name: (called.append(name), op(*args))[1]
        )
    return called


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_gives_the_gradients_of_the_total(fusion, backend, dtype):
    problem, target = drawn(fusion, dtype=dtype)
    step(problem, target, backend).total.backward()
    expected = grads(problem)
    for _ in range(2):  # with a new one, and with the one that is kept
        step(problem, target, backend).backward()
        assert same(grads(problem), expected)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_nothing_is_filled_or_scaled(fusion, backend, scalings):
    problem, target = drawn(fusion)
    step(problem, target, backend).backward()
    loss = step(problem, target, backend)
    with torch.profiler.profile() as profile:
        loss.backward()
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::ones_like", "aten::fill_", "aten::ones", "aten::mul"}
    assert scalings == []
    # float16 gradients have waited in float32
    problem, target = drawn(fusion, dtype=torch.float16)
    step(problem, target, backend).backward()
    assert scalings == ["scale_gradients"]


def test_a_hook_on_the_total_is_heard(fusion):
    problem, target = drawn(fusion)
    step(problem, target).backward()
    plain = grads(problem)
    loss = step(problem, target)
    loss.total.register_hook(lambda grad: -3 * grad)
    loss.backward()
    scaled = grads(problem)
    for name, grad in plain.items():
        torch.testing.assert_close(scaled[name], -3 * grad)


def test_a_hook_that_writes_to_the_gradient_is_heard_and_forgotten(fusion):
    problem, target = drawn(fusion)
    step(problem, target).backward()
    plain = grads(problem)
    loss = step(problem, target)
    loss.total.register_hook(lambda grad: grad.mul_(-3) and None)
    loss.backward()
    scaled = grads(problem)
    for name, grad in plain.items():
        torch.testing.assert_close(scaled[name], -3 * grad)
    step(problem, target).backward()
    assert same(grads(problem), plain)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_graph_that_is_kept_are_copies(fusion, backend, whole, scale):
    """Hooks edit what is handed out: what autograd stores as `.grad` it has copied already."""
    problem, target = drawn(fusion)
    loss = step(problem, target, backend)
    if scale != 1:
        loss.total.register_hook(lambda grad: scale * grad)
    backward = loss.backward if whole else loss.total.backward
    backward(retain_graph=True)
    first = {name: grad.clone() for name, grad in grads(problem).items()}

    def edit(grad):
        grad.mul_(7)

    hooks = [tensor.register_hook(edit) for _, tensor in problem.named()]
    backward(retain_graph=True)
    for name, grad in grads(problem).items():
        torch.testing.assert_close(grad, 7 * first[name])
    for hook in hooks:
        hook.remove()
    backward()
    assert same(grads(problem), first)


def test_inputs_may_be_chosen(fusion):
    problem, target = drawn(fusion)
    chosen = problem.features[0]
    step(problem, target).total.backward()
    expected = grads(problem)
    step(problem, target).backward(inputs=[chosen])
    found = grads(problem)
    assert torch.equal(found["features[0]"], expected["features[0]"])
    assert [name for name, grad in found.items() if grad is not None] == ["features[0]"]


def test_a_loss_without_gradients_says_what_the_total_says(fusion):
    problem, target = drawn(fusion)
    with torch.no_grad():
        loss = step(problem, target)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_kept_and_known_until_something_writes_to_it(dtype, monkeypatch):
    monkeypatch.setattr(types, "_idle", {})
    problem, target = drawn("concat", dtype=dtype)
    seen = []
    for _ in range(2):
        loss = step(problem, target)
        loss.total.register_hook(seen.append)
        loss.backward()
    assert seen[0] is seen[1]
    assert list(types._idle) == [(loss.total.device, loss.total.dtype)]
    assert seen[0].item() == 1
    assert types.is_unit_gradient(seen[0])
    assert not types.is_unit_gradient(torch.ones((), dtype=dtype))
    seen[0].mul_(3)
    assert not types.is_unit_gradient(seen[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_a_hook_kept_and_changed_afterwards_is_not_used_again(fusion, backend):
    problem, target = drawn(fusion)
    seen = []
    loss = step(problem, target, backend)
    loss.total.register_hook(seen.append)
    loss.backward()
    plain = grads(problem)
    seen[0].mul_(3)
    step(problem, target, backend).backward()
    assert same(grads(problem), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_that_writes_is_not_felt_by_another_thread(fusion, backend):
    problem, target = drawn(fusion)
    step(problem, target, backend).backward()
    plain = grads(problem)
    other, other_target = drawn(fusion)
    step(other, other_target, backend).backward()
    other_loss = step(other, other_target, backend)
    other_loss.total.register_hook(lambda grad: grad.mul_(2) and None)
    thread = threading.Thread(target=other_loss.backward)
    loss = step(problem, target, backend)

    def run_the_other(_):  # after the one is handed over, before the step looks at it
        thread.start()
        thread.join()

    loss.total.register_hook(run_the_other)
    loss.backward()
    assert same(grads(problem), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_and_real_ones_do_not_meet(backend, dtype, monkeypatch):
    monkeypatch.setattr(types, "_idle", {})

    def run():
        x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
        target = torch.zeros(4, dtype=torch.long)
        weight = torch.randn(5, 3, dtype=dtype)
        dgl_ext.fused_decouple_cross_entropy((x,), weight, target, backend=backend).backward()
        return x.grad

    for _ in range(2):  # fake before real, then after
        with FakeTensorMode():
            assert isinstance(run(), FakeTensor)
        assert type(run()) is torch.Tensor


@pytest.mark.parametrize("fusion", MODULES)
def test_a_step_runs_on_fake_tensors(fusion):
    with FakeTensorMode():
        head = MODULES[fusion]((6, 4), 3)
        x, y = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        target = torch.randint(3, (5,))
        head.cross_entropy(x, y, target=target).total.backward()
        for tensor in (x, y, *head.parameters()):
            assert tensor.grad.shape == tensor.shape
        (2 * head.cross_entropy(x, y, target=target).total).backward()

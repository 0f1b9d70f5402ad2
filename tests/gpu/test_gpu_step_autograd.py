"""The training step on a GPU under autograd: scaling, repetition, autocast, a scaler, bad input."""

from __future__ import annotations

import pytest
import torch
from support import training
from support.problems import (
    Problem,
    assert_same,
    error,
    loss_gradients,
    magnitude,
    make_present,
    make_problem,
    make_target,
)
from test_gpu import (
    ALIGNED,
    DEVICE,
    KERNELS,
    RAGGED,
    assert_bitwise,
    backends,
    exact_products,  # noqa: F401 (a fixture)
    heads,
    on_device,
    reason_to_skip,
)
from test_gpu_step import MIXED, Results, evaluate, without_hits
from torch import Tensor

import dgl_ext

_REASON = reason_to_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON)]


def make_step(head: str, dtype: torch.dtype = torch.float64, **shape: object):
    """A problem on the device, its target, and the reference's gradients on the CPU."""
    problem = make_problem(head, dtype=dtype, **(shape or RAGGED))
    target = make_target(problem, ignored=0.2)
    expected = evaluate(problem, target, "reference")
    return problem.map(on_device), on_device(target), expected


def total_of(problem: Problem, target: Tensor, backend: str) -> Tensor:
    return problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend).total


def assert_grads(problem: Problem, expected: Results, factor: float = 1.0) -> None:
    for name, tensor in problem.named():
        torch.testing.assert_close(tensor.grad.cpu(), factor * expected[name])


@backends
@pytest.mark.parametrize("upstream", [65536.0, 1 / 3, 1.0, 0.0, -2.0])
@heads
def test_the_gradient_of_the_total_scales_all_gradients(head, backend, upstream):
    problem, target, expected = make_step(head)
    (total_of(problem, target, backend) * upstream).backward()
    assert_grads(problem, expected, upstream)


@backends
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 0.5), (0.0, 3.0), (1.0, 3.0)], ids=str)
@heads
def test_retain_graph_allows_a_second_backward(head, backend, scales):
    problem, target, expected = make_step(head)
    total = total_of(problem, target, backend)
    (total * scales[0]).backward(retain_graph=True)
    (total * scales[1]).backward()
    assert_grads(problem, expected, sum(scales))
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@heads
def test_accumulates_over_micro_batches(head, backend, dtype):
    """Four micro-batches, each divided by their number, add up to the whole batch."""
    problem, target, expected = make_step(head, dtype, leading=(40,), widths=(8, 16), classes=7)
    target.clamp_(min=0)  # equally many rows count everywhere
    expected = evaluate(problem, target.cpu(), "reference")
    for i in range(4):
        rows = slice(10 * i, 10 * i + 10)
        part = Problem(
            head, tuple(h[rows] for h in problem.features), problem.weights, problem.biases
        )
        (total_of(part, target[rows], backend) / 4).backward()
    tolerance = 1e-11 if dtype == torch.float64 else 2**-8
    found = {name: tensor.grad.cpu() for name, tensor in problem.named()}
    assert_same(found, {name: expected[name] for name in found}, tolerance)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@heads
def test_no_grad_computes_the_same_losses(head, backend, dtype):
    problem, target, _ = make_step(head, dtype)
    results, differentiable = [], []
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend)
        results.append([loss.total.detach(), loss.fused, *loss.unimodal, loss.correct])
        differentiable.append(loss.total.requires_grad)
    assert differentiable == [True, False]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@heads
def test_autocast_computes_in_the_lower_dtype(head, dtype):
    problem = make_problem(head, dtype=torch.float32, **ALIGNED).map(on_device)
    target = make_target(problem).cpu()
    expected = evaluate(problem.to(dtype), target, KERNELS, 65536.0, **MIXED)
    with torch.autocast(DEVICE, dtype=dtype):
        found = evaluate(problem, target, KERNELS, 65536.0, **MIXED)
    assert {value.dtype for value in without_hits(found).values()} == {torch.float32}
    assert_bitwise(found, {name: t.to(found[name].dtype) for name, t in expected.items()})


@pytest.mark.parametrize(("dtype", "upstream"), [(torch.float32, 3.0), (torch.float16, 1.0)])
@heads
def test_compiles_into_one_graph(head, dtype, upstream):
    torch._dynamo.reset()
    problem = make_problem(head, dtype=dtype, **RAGGED).map(on_device)
    target, present = make_target(problem), make_present(problem)

    def call():
        return problem.step(
            dgl_ext.fused_decouple_cross_entropy, target, backend=KERNELS, present=present
        )

    results = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        loss = function()
        found = {"total": loss.total.detach(), "correct": loss.correct}
        results.append(found | loss_gradients(loss, problem, upstream))
    assert_same(*results, 1e-6)


# --- a scaler ---


def trained(head: str, backend: str, data: list, scaler: torch.amp.GradScaler) -> Results:
    """Parameters after a loop as people write it for float16."""
    module = training.TwoModalities(head, "loss", backend=backend).to(DEVICE)
    optimizer = training.sgd(module)
    for batch in data:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = module(*(tensor.to(DEVICE) for tensor in batch))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {name: tensor.cpu() for name, tensor in training.values(module).items()}


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE, init_scale=65536.0)


@backends
@heads
def test_a_gradient_scaler_trains_as_well_as_with_the_reference(head, backend):
    """Off float64 after some steps by no more than twice what plain PyTorch is off."""
    data = list(training.batches(8))
    exact = training.TwoModalities(head, "loss", backend="reference").double()
    start = training.values(exact)
    training.train(exact, [(x.double(), y.double(), target) for x, y, target in data])
    truth = training.values(exact)
    composition, actual = (trained(head, b, data, make_scaler()) for b in ("reference", backend))
    for name, value in truth.items():
        moved = magnitude(value - start[name])
        assert moved > 0, name
        bound = 2 * error(composition[name], value) + torch.finfo(torch.float16).eps * moved
        assert error(actual[name], value) <= bound, name


@backends
@heads
def test_a_gradient_scaler_leaves_out_a_step_that_overflows(head, backend):
    good, bad = training.batches(2)
    bad[0][3, 2] = float("inf")
    scaler = make_scaler()
    expected = trained(head, backend, [good], make_scaler())
    assert_bitwise(trained(head, backend, [good, bad], scaler), expected)
    assert scaler.get_scale() == 32768.0


# --- bad input ---


@pytest.mark.parametrize("name", ["target", "present"])
@heads
def test_the_function_names_the_device_that_does_not_fit(head, name):
    problem = make_problem(head, dtype=torch.float32)
    arguments = {"target": make_target(problem), "present": make_present(problem)}
    moved = {
        "target": on_device(arguments["target"]),
        "present": tuple(on_device(mask) for mask in arguments["present"]),
    }
    moved[name] = arguments[name]
    with pytest.raises(ValueError, match=rf"{name}.*: expected device cuda:0"):
        problem.map(on_device).step(dgl_ext.fused_decouple_cross_entropy, **moved)


@pytest.mark.parametrize("name", ["target", "present[1]"])
def test_a_raw_op_refuses_tensors_of_two_devices(name):
    problem = make_problem("sum", dtype=torch.float32, requires_grad=False)
    target, present = make_target(problem), list(make_present(problem))
    moved = problem.map(on_device)
    if name != "target":
        target, present[0] = on_device(target), on_device(present[0])
    else:
        present = [on_device(mask) for mask in present]
    groups = [list(moved.features), list(moved.weights), list(moved.biases)]
    loss = [target, present, [1.0, 1.0], True, -100, 0.0]
    needs = [[True, True]] * 3
    message = rf"linear_head_step: {name}: expected".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dgl_ext.linear_head_step.default(*groups, *loss, *needs, 0.0, 0.0, 2**20)

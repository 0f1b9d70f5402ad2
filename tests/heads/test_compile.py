"""torch.compile: one graph, dynamic batch, the same values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.problems import assert_same, cotangents_like, flat, gradients, make_problem
from support.two_pass import named_logits

import dgl_ext

# Tracing is what is tested here; generating code for each case would only cost time.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
def test_fullgraph_equals_eager(fusion, leaks):
    problem = make_problem(fusion, dtype=torch.float32)

    def call():
        return problem.call(
            dgl_ext.fused_decouple, backend="fused", encoder_leak=leaks[0], head_leak=leaks[1]
        )

    compiled = torch.compile(call, fullgraph=True, backend=BACKEND)()
    eager = call()
    cotangents = cotangents_like(eager)
    assert_same(named_logits(compiled), named_logits(eager), 1e-6)
    assert_same(
        gradients(compiled, problem, cotangents), gradients(eager, problem, cotangents), 1e-6
    )


def test_dynamic_batch_compiles_once(fusion):
    frames = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
    module = {
        "concat": dgl_ext.nn.ConcatFusion,
        "sum": dgl_ext.nn.SumFusion,
        "film": dgl_ext.nn.FiLMFusion,
    }[fusion]((5, 4), 3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=frames)
    counts = []
    for rows in (13, 7, 31):  # not the widths, which dynamic shapes would take for the same size
        x, y = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 4, requires_grad=True)
        results = []
        for call in (compiled, module):
            logits = call(x, y)
            grads = torch.autograd.grad(flat(logits), [x, y], cotangents_like(logits)[:3])
            results.append({**named_logits(logits), **dict(zip("xy", grads, strict=True))})
        assert_same(*results, 1e-6)
        counts.append(frames.frame_count)
    assert counts[-1] == counts[0] > 0


def test_a_loss_on_one_branch_gives_the_others_zeros(fusion):
    """And not None: Dynamo traces backward with a gradient for every output."""
    problem = make_problem(fusion, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def loss():
        return problem.call(dgl_ext.fused_decouple).fused.square().mean()

    named = dict(problem.named())
    loss().backward()
    for name, tensor in named.items():
        assert tensor.grad.any() != name.startswith("features"), name


def test_a_second_derivative_raises_under_compile(fusion):
    problem = make_problem(fusion, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def call():
        return problem.call(dgl_ext.fused_decouple).fused

    def second_derivative():
        fused, weight = call(), problem.weights[0]
        (grad,) = torch.autograd.grad(fused, weight, torch.randn_like(fused), create_graph=True)
        return torch.autograd.grad(grad, weight, torch.randn_like(grad))

    with pytest.raises(RuntimeError):
        second_derivative()


def test_a_training_step_by_inductor():
    """The default compiler once, end to end with losses: two encoders and a head."""
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList(torch.nn.Linear(6, 5) for _ in range(2))
    fusion = dgl_ext.nn.ConcatFusion((5, 5), 3)
    inputs = torch.randn(2, 8, 6)
    target = torch.randint(3, (8,))

    def loss():
        logits = fusion(*(encoder(x) for encoder, x in zip(encoders, inputs, strict=True)))
        return sum(torch.nn.functional.cross_entropy(z, target) for z in flat(logits))

    parameters = [*encoders.parameters(), *fusion.parameters()]
    results = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        total = function()
        results.append([total, *torch.autograd.grad(total, parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)

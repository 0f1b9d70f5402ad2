"""torch.compile on the training step: one graph, dynamic batch, the same values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.problems import assert_same, loss_gradients, make_present, make_problem, make_target
from support.two_pass import named_loss

import dgl_ext

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_fullgraph_equals_eager(fusion, dtype, masked, upstream):
    problem = make_problem(fusion, dtype=dtype)
    target = make_target(problem)
    present = make_present(problem) if masked else None

    def call():
        return problem.step(
            dgl_ext.fused_decouple_cross_entropy, target, alpha=(2.0, 0.5), present=present
        )

    results = []
    for function in (torch.compile(call, fullgraph=True, backend=BACKEND), call):
        loss = function()
        losses = named_loss(loss.total, loss.fused, loss.unimodal)
        results.append({**losses, **loss_gradients(loss, problem, upstream)})
    assert_same(*results, 1e-6)


def test_dynamic_batch_compiles_once(fusion):
    frames = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
    module = dgl_ext.nn.MODULES[fusion]((5, 4), 3)
    compiled = torch.compile(
        lambda x, y, target: module.cross_entropy(x, y, target=target),
        fullgraph=True,
        dynamic=True,
        backend=frames,
    )
    counts = []
    for rows in (13, 7, 31):
        x, y = torch.randn(rows, 5, requires_grad=True), torch.randn(rows, 4, requires_grad=True)
        target = torch.randint(3, (rows,))
        results = []
        for loss in (compiled(x, y, target), module.cross_entropy(x, y, target=target)):
            grads = torch.autograd.grad(loss.total, [x, y])
            losses = named_loss(loss.total, loss.fused, loss.unimodal)
            results.append(
                {**losses, "correct": loss.correct, **dict(zip("xy", grads, strict=True))}
            )
        assert_same(*results, 1e-6)
        counts.append(frames.frame_count)
    assert counts[-1] == counts[0] > 0


def test_a_training_step_by_inductor():
    """The default compiler once, end to end: two encoders, the step, a scaled total."""
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList(torch.nn.Linear(6, 5) for _ in range(2))
    fusion = dgl_ext.nn.ConcatFusion((5, 5), 3)
    inputs, target = torch.randn(2, 8, 6), torch.randint(3, (8,))

    def loss():
        features = (encoder(x) for encoder, x in zip(encoders, inputs, strict=True))
        return fusion.cross_entropy(*features, target=target).total * 0.5

    parameters = [*encoders.parameters(), *fusion.parameters()]
    results = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        total = function()
        results.append([total, *torch.autograd.grad(total, parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients(fusion):
    problem = make_problem(fusion, dtype=torch.float32)
    target = make_target(problem)

    @torch.compile(fullgraph=True, backend=BACKEND)
    def call():
        return problem.step(dgl_ext.fused_decouple_cross_entropy, target)

    with torch.no_grad():
        found = call()
    expected = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend="reference")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found.total.requires_grad

"""`DecoupledLogits.loss`: one loss over all outputs, whichever head they are from."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from fusion_modules import grads_of, make
from support.problems import assert_same, flat, make_problem, make_target
from torch import nn

import dgl_ext
from dgl_ext import types
from dgl_ext.nn.decoupled import Decoupled

ALPHAS = [0.5, (0.25, 3.0), torch.tensor(2.5, dtype=torch.float64), 0]


def as_pair(alpha):
    return alpha if isinstance(alpha, tuple) else (alpha, alpha)


@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
@pytest.mark.parametrize("case", ["exchange", "batch-norm", "head"])
def test_the_sum_and_its_parts(case, alpha):
    if case == "head":
        module, features = make("concat")
        module.fusion = dgl_ext.nn.ConcatFusion((5, 4), 3, dtype=torch.float64)
        module, leaves = module.fusion, list(module.fusion.parameters())
    else:
        module, features = make(case)
        module.eval()
        leaves = list(module.parameters())
    target = torch.tensor([0, 2, 1, 1, 0, 2])
    leaves += features
    total, parts = module(*features).loss(F.cross_entropy, target, alpha=alpha)
    found = torch.autograd.grad(total * 1.5, leaves)
    losses = [F.cross_entropy(z, target) for z in flat(module(*features))]
    expected = losses[0] + sum(a * z for a, z in zip(as_pair(alpha), losses[1:], strict=True))
    truth = torch.autograd.grad(expected * 1.5, leaves)
    names = [str(i) for i in range(len(leaves))]
    assert_same(dict(zip(names, found, strict=True)), dict(zip(names, truth, strict=True)), 1e-12)
    assert_same({"total": total}, {"total": expected}, 1e-12)
    assert isinstance(parts, tuple)
    assert not any(part.requires_grad for part in parts)
    assert_same(dict(zip("abc", parts, strict=True)), dict(zip("abc", losses, strict=True)), 1e-12)


def test_is_the_cross_entropy_of_a_head(fusion):
    problem = make_problem(fusion, seed=4)
    target = make_target(problem)
    step = problem.step(dgl_ext.fused_decouple_cross_entropy, target, alpha=0.75)
    total, parts = problem.call(dgl_ext.fused_decouple).loss(
        nn.CrossEntropyLoss(), target, alpha=0.75
    )
    expected = dict(zip("abcd", (step.total, step.fused, *step.unimodal), strict=False))
    assert_same(dict(zip("abcd", (total, *parts), strict=False)), expected, 1e-12)


def test_a_criterion_for_each_output_and_outputs_of_any_structure():
    class Two(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "product": a * b}

    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = Decoupled(Two(), "self")(a, b)
    has_b = torch.tensor([True, False, True, True])
    criteria = [
        lambda z, power: z["sum"].pow(power).mean(),
        lambda z, power: z["product"].sum(),
        lambda z, power: z["product"][has_b].mean(),
    ]
    total, parts = out.loss(criteria, 3, alpha=(2.0, 0.5))
    expected = [(a + b).pow(3).mean(), (a * a).sum(), (b * b)[has_b].mean()]
    assert_same(dict(zip("abc", parts, strict=True)), dict(zip("abc", expected, strict=True)))
    total.backward()
    truth = {"a": 2 * 2 * a, "b": torch.where(has_b, 0.5 * 2 * b / 3, 0.0)}
    assert_same({"a": a.grad, "b": b.grad}, truth, 1e-12)


def test_alpha_as_a_tensor_is_an_input_of_one_graph():
    torch._dynamo.reset()
    module, features = make("exchange")
    target = torch.tensor([0, 2, 1, 1, 0, 2])
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def loss(features, alpha):
        return module(*features).loss(F.cross_entropy, target, alpha=alpha)

    for value in (0.5, 2.0, 3.5):
        total, parts = loss(features, torch.tensor(value))
        expected, expected_parts = module(*features).loss(F.cross_entropy, target, alpha=value)
        named, truth = ({"total": t, **dict(zip("abc", p, strict=True))}
                        for t, p in ((total, parts), (expected, expected_parts)))  # fmt: skip
        assert_same(named, truth, 1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "criterion: expected a function or a sequence of them, got int"),
        (([F.mse_loss] * 2,), {}, ValueError, "criterion: expected 3 functions, .*, got 2"),
        (([F.mse_loss, 2, 3],), {}, TypeError, r"criterion\[1\]: expected a function, got int"),
        ((torch.abs,), {}, ValueError, r"criterion\[0\]: expected a scalar tensor, got shape \(6"),
        ((lambda z: 0.5,), {}, TypeError, r"criterion\[0\]: expected a scalar tensor, got float"),
        ((torch.sum,), {"alpha": (1.0,)}, ValueError, "alpha: expected 2 numbers, .*, got 1"),
        ((torch.sum,), {"alpha": "1"}, TypeError, "alpha: expected a number, or a sequence"),
        ((torch.sum,), {"alpha": torch.ones(2)}, TypeError, "alpha: expected a number, or a se"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    module, features = make("concat")
    with pytest.raises(error, match=message):
        module(*features).loss(*arguments, **options)


def test_docstring_examples():
    result = doctest.testmod(types, extraglobs={"torch": torch, "dgl_ext": dgl_ext})
    assert result.attempted > 0
    assert result.failed == 0


def test_losses_are_reported_without_a_graph_of_their_own():
    module, features = make("concat")
    total, parts = module(*features).loss(lambda z: z.square().mean())
    total.backward()
    assert all(part.grad_fn is None for part in parts)
    assert all(grad is not None for grad in grads_of(module.fusion, features).values())

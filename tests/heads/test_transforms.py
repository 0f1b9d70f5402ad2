"""What PyTorch does with a function besides running it: transforms, tracing, batches, tangents."""

from __future__ import annotations

import re
from itertools import compress

import pytest
import torch
from support.problems import (
    Problem,
    assert_same,
    flat,
    make_present,
    make_problem,
    make_target,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import dgl_ext
from dgl_ext._arguments.heads import HEADS

LEAKS = [(0.0, 0.0), (0.25, 0.5), (1.0, 1.0)]
SIZE, ROWS = 3, 4


def outputs(problem: Problem, mode: str, backend: str, masked: bool = False) -> tuple[Tensor, ...]:
    """All logits of a problem, or its loss."""
    options = {"backend": backend, "present": make_present(problem) if masked else None}
    if mode == "logits":
        return flat(problem.call(dgl_ext.fused_decouple, **options))
    target = make_target(problem, ignored=0.3)
    return (problem.step(dgl_ext.fused_decouple_cross_entropy, target, **options).total,)


def draw_like(tensor: Tensor, *size: int, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((*size, *tensor.shape), dtype=tensor.dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["logits", "step"])
@pytest.mark.parametrize("way", ["autograd", "func"])
def test_a_batch_of_gradients(fusion, way, mode, masked, dtype):
    """As of `jacobian(vectorize=True)`, and of methods that weigh one loss against another."""
    problem = make_problem(fusion, leading=(ROWS,), dtype=dtype, seed=6)
    named = dict(problem.named())

    def gradients(output: Tensor, cotangent: Tensor, batched: bool = False):
        return torch.autograd.grad(
            output,
            list(named.values()),
            cotangent,
            is_grads_batched=batched,
            retain_graph=True,
            allow_unused=True,
        )

    for output in outputs(problem, mode, "auto", masked):
        cotangents = draw_like(output, SIZE)
        each = [gradients(output, cotangent) for cotangent in cotangents]
        expected = [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]
        if way == "func":  # which has no None
            there = [g is not None for g in expected]

            def of_one(cotangent: Tensor, z: Tensor = output, there: list = there) -> tuple:
                return tuple(compress(gradients(z, cotangent), there))

            dealt = iter(torch.func.vmap(of_one)(cotangents))
            found = [next(dealt) if t else None for t in there]
        else:
            found = gradients(output, cotangents, batched=True)
        ours, theirs = dict(zip(named, found, strict=True)), dict(zip(named, expected, strict=True))
        assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("mode", ["logits", "step"])
@pytest.mark.parametrize("way", ["autograd", "func"])
def test_a_batch_of_second_derivatives_is_refused(fusion, mode, way):
    problem = make_problem(fusion, leading=(ROWS,))
    output = outputs(problem, mode, "auto")[-1]

    def first(cotangent: Tensor, batched: bool) -> Tensor:
        y = problem.features[-1]
        options = {"create_graph": True, "is_grads_batched": batched}
        return torch.autograd.grad(output, y, cotangent, **options)[0]

    cotangents = draw_like(output, SIZE)
    batch = torch.func.vmap(lambda c: first(c, False)) if way == "func" else None
    with pytest.raises(RuntimeError, match='backend="reference"'):
        batch(cotangents) if batch else first(cotangents, True)


@pytest.mark.parametrize("leaks", LEAKS)
@pytest.mark.parametrize("mode", ["logits", "step"])
def test_forward_mode_is_the_transpose_of_backward(fusion, mode, leaks):
    """sum(c . J t) is the same by tangents and by gradients, where routing is linear."""
    problem = make_problem(fusion, leading=(ROWS,), seed=2)
    named = dict(problem.named())
    tangents = {name: draw_like(t, seed=i) for i, (name, t) in enumerate(named.items())}
    options = {"encoder_leak": leaks[0], "head_leak": leaks[1]}

    def run(drawn: Problem) -> tuple[Tensor, ...]:
        if mode == "logits":
            return flat(drawn.call(dgl_ext.fused_decouple, **options))
        target = make_target(drawn)
        return (drawn.step(dgl_ext.fused_decouple_cross_entropy, target, **options).total,)

    results = run(problem)
    cotangents = [draw_like(z, seed=30 + i) for i, z in enumerate(results)]
    grads = torch.autograd.grad(results, list(named.values()), cotangents, materialize_grads=True)
    expected = sum((g * tangents[name]).sum() for name, g in zip(named, grads, strict=True))
    with forward_ad.dual_level():
        by_id = {id(t): forward_ad.make_dual(t.detach(), tangents[n]) for n, t in named.items()}
        groups = [
            tuple(by_id[id(t)] for t in group)
            for group in (problem.features, problem.weights, problem.biases)
        ]
        found = torch.zeros((), dtype=torch.float64)
        for output, cotangent in zip(run(Problem(fusion, *groups)), cotangents, strict=True):
            tangent = forward_ad.unpack_dual(output).tangent
            found += 0 if tangent is None else (tangent * cotangent).sum()
    assert_same({"J": found}, {"J": expected.detach()}, 1e-10)


@pytest.mark.parametrize("leaks", LEAKS)
def test_torch_func(fusion, leaks):
    problem = make_problem(fusion, leading=(ROWS,), seed=9)
    encoder_leak, head_leak = leaks
    options = {"encoder_leak": encoder_leak, "head_leak": head_leak}

    def total(*features: Tensor) -> Tensor:
        drawn = Problem(fusion, features, problem.weights, problem.biases)
        target = make_target(problem)
        return drawn.step(dgl_ext.fused_decouple_cross_entropy, target, **options).total

    found = torch.func.grad(total, argnums=(0, 1))(*problem.features)
    expected = torch.autograd.grad(total(*problem.features), problem.features)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-12)


BEYOND = {
    "torch.func": lambda call: torch.func.vmap(lambda _: call())(torch.zeros(2)),
    "torch.jit.trace": lambda call: torch.jit.trace(lambda _: call(), torch.zeros(2)),
    "forward-mode differentiation": lambda call: _in_dual_level(call),
}


def _in_dual_level(call):
    with forward_ad.dual_level():
        return call()


@pytest.mark.parametrize("what", BEYOND)
@pytest.mark.parametrize("mode", ["logits", "step"])
def test_what_an_explicit_backend_cannot_do(what, mode):
    problem = make_problem("concat", leading=(ROWS,), requires_grad=False)
    options = {"backend": "fused"}
    target = make_target(problem)

    def call() -> Tensor:
        if mode == "logits":
            return problem.call(dgl_ext.fused_decouple, **options).fused
        return problem.step(dgl_ext.fused_decouple_cross_entropy, target, **options).total

    message = f'backend: "fused" cannot be part of {what}: use backend="reference" or "auto"'
    with pytest.raises(ValueError, match=re.escape(message)):
        BEYOND[what](call)


class Model(nn.Module):
    """Two encoders and a head, whose logits or loss it returns."""

    def __init__(self, fusion: str, step: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.v = nn.Linear(3, 6), nn.Linear(2, 5)
        self.head = dgl_ext.nn.MODULES[fusion]((6, 5), 4)
        self.step = step

    def forward(self, a: Tensor, v: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.step:
            loss = self.head(self.a(a), self.v(v), target=target)
            return loss.total, loss.fused, loss.unimodal[1]
        logits = self.head(self.a(a), self.v(v))
        return logits.fused, logits.unimodal[0], logits.unimodal[1]


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("fusion", HEADS)
@pytest.mark.parametrize("trace", ["jit", "fx"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing(trace, fusion, step):
    model = Model(fusion, step)
    inputs = torch.randn(5, 3), torch.randn(5, 2), torch.randint(4, (5,))
    jit = trace == "jit"
    traced = torch.jit.trace(model, inputs) if jit else torch.fx.symbolic_trace(model)
    others = torch.randn(7, 3), torch.randn(7, 2), torch.randint(4, (7,))
    found = {}
    for name, function in (("eager", model), ("traced", traced)):
        model.zero_grad()
        results = function(*others)
        torch.manual_seed(3)
        used = [z for z in results if z.requires_grad]
        torch.autograd.backward(used, [torch.randn_like(z) for z in used])
        found[name] = dict(enumerate(results)) | {
            name: p.grad for name, p in model.named_parameters()
        }
    assert found["eager"]["a.weight"].any()
    assert_same(found["traced"], found["eager"], 1e-6)


def test_fx_traces_a_call_of_the_function():
    weight = torch.randn(3, 7)

    class Calls(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return dgl_ext.fused_decouple((x, y), weight).fused

    x, y = torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(torch.fx.symbolic_trace(Calls())(x, y), Calls()(x, y))


def test_inputs_that_copy_on_write_stay_what_they_are(fusion):
    problem = make_problem(fusion, leading=(ROWS,), dtype=torch.float32, requires_grad=False)
    lazy = problem.map(torch._lazy_clone)
    for mode in ("logits", "step"):
        for ours, theirs in zip(
            outputs(lazy, mode, "auto"), outputs(problem, mode, "auto"), strict=True
        ):
            assert torch.equal(ours, theirs)
    for (name, ours), (_, theirs) in zip(lazy.named(), problem.named(), strict=True):
        assert torch.equal(ours, theirs), name

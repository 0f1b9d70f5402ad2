"""Lazily negated tensors, and zeros without storage, count as what they stand for everywhere."""

import pytest
import torch
from support.problems import make_problem, make_target

import dgl_ext
from dgl_ext._arguments.heads import HEADS


def negated(tensor):
    return torch._neg_view(-tensor)


def zeros(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def plain(tensor):
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor.resolve_neg()


def raw_calls(fusion):
    """Yields each op of a head with a list of its arguments."""
    problem = make_problem(fusion, requires_grad=False)
    features, weights, biases = map(list, (problem.features, problem.weights, problem.biases))
    stem = "film" if fusion == "film" else "linear"
    ops = torch.ops.dgl_ext
    masks = [torch.arange(7) % 3 != i for i in range(2)]
    needs = ([True] * 2, [True] * len(weights), [True] * len(weights), 0.25, 0.5)
    forward = [features, weights, biases, masks]
    yield getattr(ops, f"{stem}_head_forward"), forward
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights_of_loss = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 7)]
    outputs = getattr(ops, f"{stem}_head_forward")(*forward)
    kept = [biases, outputs[3]] if fusion == "film" else []
    yield (
        getattr(ops, f"{stem}_head_backward"),
        [grads, features, weights, *kept, masks, *needs],
    )
    yield (
        getattr(ops, f"{stem}_head_step"),
        [
            *forward[:3],
            make_target(problem),
            *weights_of_loss,
            masks,
            [0.5, 2.0],
            True,
            -100,
            0.1,
            *needs,
            0,
        ],
    )


@pytest.mark.parametrize("lazy", [negated, zeros])
@pytest.mark.parametrize("fusion", HEADS)
def test_a_raw_op_resolves_every_tensor(fusion, lazy):
    tried = 0
    for op, arguments in raw_calls(fusion):
        for i, argument in enumerate(arguments):
            entries = argument if isinstance(argument, list) else [argument]
            for j, entry in enumerate(entries):
                if not isinstance(entry, torch.Tensor):
                    continue
                if lazy is negated and not entry.is_floating_point():
                    continue

                def call(value, op=op, arguments=arguments, i=i, j=j):
                    changed = list(arguments)
                    if isinstance(changed[i], list):
                        changed[i] = [*changed[i][:j], value, *changed[i][j + 1 :]]
                    else:
                        changed[i] = value
                    return op(*changed)

                value = lazy(entry)
                torch.testing.assert_close(
                    call(value), call(plain(value)), rtol=0, atol=0, equal_nan=True
                )
                tried += 1
    assert tried >= 14


@pytest.mark.parametrize("fusion", HEADS)
def test_lazy_gradients_of_the_logits(fusion):
    for lazy in (negated, zeros):
        grads = []
        for resolve in (lambda t: t, plain):
            problem = make_problem(fusion)
            out = dgl_ext.fused_decouple(
                problem.features,
                problem.weights[0] if fusion == "concat" else problem.weights,
                problem.biases[0] if fusion == "concat" else problem.biases,
                fusion=fusion,
            )
            logits = (out.fused, *out.unimodal)
            generator = torch.Generator().manual_seed(9)
            upstream = [
                resolve(lazy(torch.randn(z.shape, generator=generator, dtype=z.dtype)))
                for z in logits
            ]
            torch.autograd.backward(logits, upstream)
            tensors = (*problem.features, *problem.weights, *problem.biases)
            grads.append([t.grad for t in tensors])
        torch.testing.assert_close(*grads, rtol=0, atol=0)

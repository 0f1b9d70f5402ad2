"""torch's own checks of the ops: schema, fake kernels, tracing with dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from support.problems import COMPILED_BACKENDS, make_problem

from dgl_ext._ops.library import FAKE_KERNELS, Executor

EXECUTORS = (0, *(Executor[name.upper()] for name in COMPILED_BACKENDS))
SAMPLES = {
    "contiguous": {},
    "transposed": {"layout": "transposed", "leading": (3, 5)},
    "sliced": {"layout": "sliced"},
    "expanded": {"layout": "expanded"},
    "empty": {"leading": (0,)},
    "bfloat16": {"dtype": torch.bfloat16},
    "no_bias": {"bias": False},
}


def arguments(name: str, fusion: str, sample: dict) -> tuple:
    problem = make_problem(fusion, requires_grad=False, **sample)
    features, weights = list(problem.features), list(problem.weights)
    biases = list(problem.biases)
    if name.startswith("scale_gradients"):
        scale = torch.tensor(3.0, dtype=torch.promote_types(features[0].dtype, torch.float32))
        # Gradients are contiguous, as a step returns them.
        grads = [t.clone(memory_format=torch.contiguous_format) for t in features + weights]
        return (grads, scale) if name.endswith("_") else (grads, scale, False)
    head, direction = name.rsplit("_", 1)
    leading, classes = features[0].shape[:-1], weights[-1].shape[0]
    generator = torch.Generator().manual_seed(1)
    present = [torch.rand(leading, generator=generator) < 0.7, None]
    if direction == "forward":
        return features, weights, biases, present
    needs = [[True] * len(features), [True] * len(weights), [b is not None for b in biases]]
    if direction == "step":
        target = torch.randint(-1, classes, leading, generator=generator)
        mean = target.numel() > 0  # opcheck takes the NaN of no row for a difference
        loss = target, None, None, present, [0.5, 2.0], mean, -1, 0.1
        return features, weights, biases, *loss, *needs, 0.5, 0.25, 2**20
    inputs = features, weights, biases, present
    outputs = getattr(torch.ops.dgl_ext, f"{head}_forward").default(*inputs)
    logits = outputs[: len(features) + 1]
    grads = [torch.randn(z.shape).to(z.dtype) for z in logits]
    extra = [biases, outputs[-1]] if fusion == "film" else []
    needs = [[True] * len(group) for group in (features, weights, biases)]
    return grads, features, weights, *extra, present, *needs, 0.5, 0.25


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        (name, fusion)
        for name in FAKE_KERNELS
        for fusion in (("film",) if name.startswith("film") else ("concat", "sum"))
    ],
)
def test_opcheck(name, fusion, sample):
    op = getattr(torch.ops.dgl_ext, name).default
    sample_arguments = arguments(name, fusion, SAMPLES[sample])
    executors = (0,) if name.startswith("scale") else EXECUTORS
    for executor in executors:
        more = (False, executor) if executor else ()
        torch.library.opcheck(op, (*sample_arguments, *more))


@pytest.mark.parametrize("fusion", ["concat", "sum", "film"])
def test_opcheck_with_some_gradients_left_out(fusion):
    name = "film_head_backward" if fusion == "film" else "linear_head_backward"
    grads, *rest = arguments(name, fusion, {})
    needs = [[i == 0 for i, _ in enumerate(group)] for group in rest[-5:-2]]
    op = getattr(torch.ops.dgl_ext, name).default
    torch.library.opcheck(op, ([*grads[:2], None], *rest[:-5], *needs, 0.0, 0.0))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("fusion", ["concat", "sum", "film"])
def test_a_raw_backward_without_any_gradient_returns_zeros(fusion, executor):
    name = f"{'film' if fusion == 'film' else 'linear'}_head_backward"
    grads, *rest = arguments(name, fusion, {})
    found = getattr(torch.ops.dgl_ext, name).default([None] * len(grads), *rest, False, executor)
    wanted = [*rest[0], *rest[1], *(w[:, 0] for w in rest[1])]
    assert [g.shape for g in found] == [t.shape for t in wanted]
    assert all(not g.any() for g in found)


HEAD_OPS = [name for name in FAKE_KERNELS if not name.startswith("scale")]


@pytest.mark.parametrize("name", HEAD_OPS)
def test_an_executor_that_there_is_not_is_an_error(name):
    op = getattr(torch.ops.dgl_ext, name).default
    sample = arguments(name, "film" if name.startswith("film") else "concat", {})
    wanted = "0, 1 or 2" if Executor.LIBRARY in EXECUTORS else "0 or 1 on the CPU"
    for executor in {-1, 2, 3} - set(EXECUTORS):
        with pytest.raises(RuntimeError, match=f"executor: expected {wanted}, got {executor}"):
            op(*sample, False, executor)


@pytest.mark.parametrize("name", [name for name in HEAD_OPS if name.endswith("step")])
def test_a_workspace_limit_of_zero_is_the_default_and_less_an_error(name):
    op = getattr(torch.ops.dgl_ext, name).default
    *sample, _ = arguments(name, "film" if name.startswith("film") else "concat", {})
    default = op(*sample, 0)
    for found, expected in zip(default, op(*sample, 64 * 2**20), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=r"workspace_limit: .* got -1"):
        op(*sample, -1)


def test_every_defined_op_has_a_fake_kernel():
    defined = {
        schema.name.removeprefix("dgl_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dgl_ext::")
    }
    assert defined == set(FAKE_KERNELS)

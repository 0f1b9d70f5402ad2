"""Which loss reaches what: the method itself, stated so that nobody can repair it away.

gradcheck must fail on what is cut and pass on the rest; what nothing reaches gets `None`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support.problems import (
    BACKENDS,
    assert_same,
    assert_same_names,
    cotangents_like,
    flat,
    gradients,
    make_problem,
)
from support.two_pass import named_logits

import dgl_ext
from dgl_ext._arguments.heads import HEADS

LEAKS = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (1.0, 1.0)]


def small(fusion: str, **options):
    return make_problem(fusion, leading=(3,), widths=(2, 3), classes=2, **options)


def run_gradcheck(problem, backend: str, outputs: slice, **leaks) -> bool:
    """Numerical against analytical gradients of some outputs by all inputs that require grad."""
    inputs = [tensor for _, tensor in problem.named()]

    def call(*_):
        return flat(problem.call(dgl_ext.fused_decouple, backend=backend, **leaks))[outputs]

    return torch.autograd.gradcheck(call, inputs, raise_exception=False)


def require_grad_only(problem, prefixes: tuple[str, ...]) -> None:
    for name, tensor in problem.named():
        tensor.requires_grad_(name.startswith(prefixes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_passes_on_what_the_method_keeps(fusion, backend):
    """The fused logits by the head's parameters; each unimodal one by its own feature."""
    problem = small(fusion)
    require_grad_only(problem, ("weight", "bias"))
    assert run_gradcheck(problem, backend, slice(0, 1))
    for i in range(2):
        require_grad_only(problem, (f"features[{i}]",))
        assert run_gradcheck(problem, backend, slice(1 + i, 2 + i))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_fails_on_what_the_method_cuts(fusion, backend):
    """The fused logits by the features; the unimodal ones by the head's parameters."""
    problem = small(fusion)
    require_grad_only(problem, ("features", "weight", "bias"))
    assert not run_gradcheck(problem, backend, slice(0, 1))
    assert not run_gradcheck(problem, backend, slice(1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_passes_with_both_leaks_open(fusion, backend):
    problem = small(fusion)
    assert run_gradcheck(problem, backend, slice(0, 3), encoder_leak=1, head_leak=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_multimodal_loss_leaves_the_encoders_alone(fusion, backend):
    problem = small(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    logits.fused.backward(torch.randn_like(logits.fused))
    for name, tensor in problem.named():
        assert (tensor.grad is None) == name.startswith("features"), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", [0, 1])
def test_a_unimodal_loss_reaches_its_own_encoder_and_nothing_else(fusion, backend, i):
    problem = small(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    logits.unimodal[i].backward(torch.randn_like(logits.unimodal[i]))
    for name, tensor in problem.named():
        assert (tensor.grad is not None) == (name == f"features[{i}]"), name


def test_none_reaches_through_an_encoder(fusion):
    """An encoder that no loss reaches keeps .grad None, so that AdamW does not decay it."""
    problem = small(fusion)
    encoder = torch.nn.Linear(2, 2, dtype=torch.float64)
    problem.features = (encoder(problem.features[0].detach()), problem.features[1].detach())
    logits = problem.call(dgl_ext.fused_decouple)
    logits.fused.backward(torch.randn_like(logits.fused))
    assert encoder.weight.grad is None
    assert encoder.bias.grad is None


def subsets(length: int):
    return list(itertools.product((False, True), repeat=length))


@pytest.mark.parametrize(("encoder_leak", "head_leak"), LEAKS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_losses_gives_the_same_nones_as_the_reference(
    fusion, encoder_leak, head_leak, bias
):
    problem = small(fusion, bias=bias)
    for used in subsets(3):
        results = []
        for backend in BACKENDS:
            logits = problem.call(
                dgl_ext.fused_decouple,
                backend=backend,
                encoder_leak=encoder_leak,
                head_leak=head_leak,
            )
            cotangents = [
                g if use else None for g, use in zip(cotangents_like(logits), used, strict=True)
            ]
            grads = gradients(logits, problem, cotangents)
            results.append({**named_logits(logits), **grads})
        for found in results[1:]:
            assert_same(found, results[0])


@pytest.mark.parametrize(("encoder_leak", "head_leak"), LEAKS)
def test_every_subset_of_requires_grad_agrees_with_the_reference(fusion, encoder_leak, head_leak):
    """Values, `None`s and the outputs' own requires_grad: a loss on frozen parts raises in both."""
    problem = small(fusion)
    tensors = [tensor for _, tensor in problem.named()]
    for wanted in subsets(len(tensors)):
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        results = []
        for backend in BACKENDS:
            logits = problem.call(
                dgl_ext.fused_decouple,
                backend=backend,
                encoder_leak=encoder_leak,
                head_leak=head_leak,
            )
            live = {str(i): z if z.requires_grad else None for i, z in enumerate(flat(logits))}
            grads = gradients(logits, problem, cotangents_like(logits))
            results.append((live, {**named_logits(logits), **grads}))
        for live, found in results[1:]:
            assert_same_names(live, results[0][0])
            assert_same(found, results[0][1])


@pytest.mark.parametrize("bias", [(True, False), (False, True)])
@pytest.mark.parametrize("head", [name for name, head in HEADS.items() if not head.single_weight])
def test_one_bias_of_two(head, bias):
    problem = small(head, bias=bias)
    results = []
    for backend in BACKENDS:
        logits = problem.call(dgl_ext.fused_decouple, backend=backend, head_leak=0.5)
        grads = gradients(logits, problem, cotangents_like(logits))
        results.append({**named_logits(logits), **grads})
    for found in results[1:]:
        assert_same(found, results[0])


def test_a_second_derivative_raises_and_is_never_zero(fusion):
    problem = small(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    (grad,) = torch.autograd.grad(
        logits.fused, problem.weights[0], torch.randn_like(logits.fused), create_graph=True
    )
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(grad, problem.weights[0], torch.randn_like(grad))


def test_the_reference_has_second_derivatives():
    problem = small("film")
    require_grad_only(problem, ("weight", "bias"))

    def fused(*parameters):
        return problem.call(dgl_ext.fused_decouple, backend="reference").fused

    assert torch.autograd.gradgradcheck(fused, [t for _, t in problem.named() if t.requires_grad])


@pytest.mark.parametrize("head", ["linear_head", "film_head"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_raw_op_refuses_to_lose_a_gradient(head, direction):
    problem = small("film" if head == "film_head" else "concat")
    op = getattr(torch.ops.dgl_ext, f"{head}_{direction}").default
    parameters = [list(problem.features), list(problem.weights)]
    biases = list(problem.biases)
    if direction == "forward":
        arguments = [*parameters, biases, []]
    else:
        grads = [torch.randn(3, 2, dtype=torch.float64) for _ in range(3)]
        needs = [[True, True], [True] * len(biases), [True] * len(biases)]
        film = [biases, torch.randn(3, 6, dtype=torch.float64)] if head == "film_head" else []
        arguments = [grads, *parameters, *film, [], *needs, 0.0, 0.0]
    with pytest.raises(RuntimeError, match="not differentiable on its own"):
        op(*arguments)
    with torch.no_grad():
        assert len(op(*arguments)) > 0


def test_inputs_are_not_changed_and_outputs_share_no_memory(fusion):
    problem = small(fusion)
    before = {name: tensor.detach().clone() for name, tensor in problem.named()}
    logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    cotangents = cotangents_like(logits)
    kept = [g.clone() for g in cotangents]
    gradients(logits, problem, cotangents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.named())
    assert all(torch.equal(a, b) for a, b in zip(cotangents, kept, strict=True))
    storages = {z.untyped_storage().data_ptr() for z in flat(logits)}
    assert len(storages) == len(flat(logits))


def test_an_input_changed_before_backward_is_an_error(fusion):
    problem = small(fusion)
    logits = problem.call(dgl_ext.fused_decouple, backend="fused")
    with torch.no_grad():
        problem.weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.unimodal[0].backward(torch.randn_like(logits.unimodal[0]))


def test_torch_func_transforms_take_the_reference(fusion):
    problem = small(fusion)
    require_grad_only(problem, ())

    def loss(x, y):
        problem.features = (x, y)
        return problem.call(dgl_ext.fused_decouple).unimodal[0].square().mean()

    x, y = problem.features
    found = torch.func.grad(loss, argnums=(0, 1))(x, y)
    expected = torch.autograd.grad(loss(x.requires_grad_(), y), x)
    assert_same({"x": found[0], "y": found[1]}, {"x": expected[0], "y": torch.zeros_like(y)})
    assert found[0].any()

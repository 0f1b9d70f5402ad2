"""The modules: parameters, names, initial values, and that they call the function."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from support.problems import assert_same, head_arguments
from support.two_pass import named_logits

import dgl_ext
from dgl_ext.nn import MODULES, ConcatFusion, FiLMFusion, SumFusion

NAMES = {
    "concat": ["linear.weight", "linear.bias"],
    "sum": ["linears.0.weight", "linears.0.bias", "linears.1.weight", "linears.1.bias"],
    "film": ["film.weight", "film.bias", "out.weight", "out.bias"],
}


def make(fusion: str, **options):
    torch.manual_seed(0)
    return MODULES[fusion]((6, 4), 3, **options)


def features(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, width, generator=generator).to(dtype) for width in (6, 4)]


def test_state_dict_names(fusion):
    assert list(make(fusion).state_dict()) == NAMES[fusion]


def test_forward_calls_the_function(fusion):
    module = make(fusion)
    weight, bias = head_arguments(module)
    expected = dgl_ext.fused_decouple(features(), weight, bias, fusion=fusion, backend="reference")
    assert_same(named_logits(module(*features())), named_logits(expected), 1e-5)


def test_concat_loads_the_state_of_a_linear_layer():
    linear = torch.nn.Linear(10, 3)
    module = make("concat")
    module.load_state_dict(linear.state_dict())
    expected = linear(torch.cat(features(), dim=-1))
    torch.testing.assert_close(module(*features()).fused, expected)


def test_parameters_are_drawn_as_linear_draws_them():
    torch.manual_seed(3)
    linear = torch.nn.Linear(10, 3)
    torch.manual_seed(3)
    module = ConcatFusion((6, 4), 3)
    assert torch.equal(module.weight, linear.weight)
    assert torch.equal(module.bias, linear.bias)
    torch.manual_seed(3)
    linears = [torch.nn.Linear(width, 3) for width in (6, 4)]
    torch.manual_seed(3)
    for mine, theirs in zip(SumFusion((6, 4), 3).linears, linears, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_reset_parameters_draws_again(fusion):
    module = make(fusion)
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    assert all(not torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_film_starts_with_gamma_one_plus_something():
    module = FiLMFusion((6, 4), 3)
    assert torch.equal(module.film.bias[:4], torch.ones(4))
    module.reset_parameters()
    assert torch.equal(module.film.bias[:4], torch.ones(4))
    assert not torch.equal(module.film.bias[4:], torch.ones(4))


def test_without_bias(fusion):
    module = make(fusion, bias=False)
    names = [n for n in NAMES[fusion] if not n.endswith("bias") or n == "film.bias"]
    assert list(module.state_dict()) == names
    assert module(*features()).fused.shape == (5, 3)


def test_device_and_dtype(fusion):
    module = make(fusion, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert {p.device.type for p in make(fusion, device="meta").parameters()} == {"meta"}


def test_options_reach_the_function(fusion):
    """With both leaks open every loss reaches everything; a masked row gets logits of nothing."""
    module = make(fusion, encoder_leak=1.0, head_leak=1.0)
    inputs = [x.requires_grad_() for x in features()]
    fused = module(*inputs).fused
    fused.backward(torch.randn_like(fused))
    assert all(x.grad is not None for x in inputs)
    present = [torch.tensor([True, False, True, True, True]), None]
    with torch.no_grad():
        inputs[0][1] = float("nan")
        masked = module(*inputs, present=present)
    assert masked.fused.isfinite().all()


def test_extra_repr(fusion):
    text = make(fusion).extra_repr()
    assert text.startswith("in_features=(6, 4), out_features=3")
    assert "leak" not in text
    text = make(fusion, head_leak=0.5, backend="reference").extra_repr()
    assert "head_leak=0.5" in text
    assert "backend='reference'" in text


def test_copies_and_pickles(fusion):
    module = make(fusion)
    expected = named_logits(module(*features()))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(named_logits(other(*features())), expected, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 512}, TypeError, r"in_features: expected a tuple of ints, .*, got int"),
        (
            {"in_features": (512, 0)},
            ValueError,
            r"in_features\[1\]: expected a positive int, got 0",
        ),
        ({"in_features": (5.0, 4)}, TypeError, r"in_features\[0\]: expected an int, got float"),
        ({"out_features": -1}, ValueError, r"out_features: expected a positive int, got -1"),
        ({"out_features": True}, TypeError, r"out_features: expected an int, got bool"),
        ({"encoder_leak": 2}, ValueError, r"encoder_leak: expected a number in \[0, 1\], got 2"),
        ({"backend": "cuda9"}, ValueError, r"backend: expected one of .*, got 'cuda9'"),
        ({"in_features": ()}, ValueError, r"in_features: expected .* widths for fusion=.*, got 0"),
    ],
)
def test_bad_arguments(fusion, arguments, error, message):
    with pytest.raises(error, match=message):
        MODULES[fusion](**{"in_features": (6, 4), "out_features": 3, **arguments})


def test_film_takes_two_modalities():
    with pytest.raises(ValueError, match=r'expected 2 widths for fusion="film", got 3'):
        FiLMFusion((6, 4, 2), 3)


@pytest.mark.parametrize("fusion", MODULES)
def test_hooks_of_a_head_run_in_both_modes(fusion):
    head = MODULES[fusion]((6, 4), 3)
    seen = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    head.register_forward_hook(lambda module, inputs, output: seen.append(type(output).__name__))
    features = torch.randn(5, 6), torch.randn(5, 4)
    target = torch.randint(3, (5,))
    head(*features)
    by_name = head.cross_entropy(*features, target=target, alpha=0.5)
    called = head(*features, target=target, alpha=0.5)
    assert seen == [2, "DecoupledLogits", 2, "DecoupledLoss", 2, "DecoupledLoss"]
    torch.testing.assert_close(by_name, called, rtol=0, atol=0)


@pytest.mark.parametrize("fusion", MODULES)
def test_a_head_names_what_it_cannot_take(fusion):
    head = MODULES[fusion]((6, 4), 3)
    x, y, target = torch.randn(5, 6), torch.randn(5, 4), torch.randint(3, (5,))
    for features, message in (
        ((y, x), r"features\[0\]: expected shape \(\.\.\., 6\) as in_features, got \(5, 4\)"),
        (
            (x, y[:, :3]),
            r"features\[1\]: expected shape \(\.\.\., 4\) as in_features, got \(5, 3\)",
        ),
        ((torch.cat([x, y], 1),), "features: expected 2 tensors as in_features, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            head(*features)
        with pytest.raises(ValueError, match=message):
            head.cross_entropy(*features, target=target)
    with pytest.raises(TypeError, match="alpha: expected only together with a target"):
        head(x, y, alpha=0.5)
    with pytest.raises(
        TypeError, match="target: expected a tensor of classes or probabilities, got NoneType"
    ):
        head.cross_entropy(x, y, target=None)


def test_numpy_numbers_and_tensors_of_one_number_are_numbers():
    head = dgl_ext.nn.ConcatFusion((np.int64(6), 4), np.int32(3), encoder_leak=np.float32(0.5))
    assert type(head.out_features) is int
    assert type(head.encoder_leak) is float
    features, target = (torch.randn(5, 6), torch.randn(5, 4)), torch.tensor([0, 1, 2, 7, 1])
    options = {"label_smoothing": np.float64(0.25), "ignore_index": np.int64(7)}
    expected = head.cross_entropy(
        *features, target=target, alpha=0.5, label_smoothing=0.25, ignore_index=7
    )
    for alpha in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), (np.float32(0.5), 0.5)):
        loss = head.cross_entropy(*features, target=target, alpha=alpha, **options)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="ignore_index: expected an int of 64 bits, got"):
        head.cross_entropy(*features, target=target, ignore_index=2**63)


@pytest.mark.parametrize("name", ["alpha", "label_smoothing", "encoder_leak", "head_leak"])
def test_a_number_that_changes_in_its_tensor_is_read_anew(name):
    h, weight = torch.randn(5, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    target, number = torch.tensor([0, 1, 2, 0, 1]), torch.tensor(0.25)
    for value in (0.25, 0.75):
        number.fill_(value)
        results = []
        for given in (number, value):
            loss = dgl_ext.fused_decouple_cross_entropy((h,), weight, target, **{name: given})
            results.append((loss.total, *torch.autograd.grad(loss.total, (h, weight))))
        torch.testing.assert_close(*results, rtol=0, atol=0)

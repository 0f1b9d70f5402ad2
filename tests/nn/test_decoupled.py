"""`Decoupled` against the two-pass recipe, on fusion modules as people write them."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from fusion_modules import (
    CASES,
    Concat,
    Imputer,
    NormedMLP,
    grads_of,
    make,
    outputs_like,
    recipe,
    run,
    substituted,
)
from support.problems import assert_same, cotangents_like, flat
from support.two_pass import named_logits
from torch import nn

import dgl_ext
from dgl_ext.nn import decoupled
from dgl_ext.nn.decoupled import Decoupled


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_equals_two_passes(case, training):
    module, features = make(case)
    module.train(training)
    twin = copy.deepcopy(module.fusion)
    cotangents = outputs_like(module, features)
    out, grads = run(module, features, cotangents)
    expected, expected_grads, buffers = recipe(twin, features, cotangents)
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, expected_grads, 1e-12)
    assert all(grad is not None for grad in grads.values())
    assert_same(dict(module.fusion.named_buffers()), buffers, 1e-12)


def test_concat_equals_the_op():
    module, features = make("concat")
    cotangents = outputs_like(module, features)
    out, grads = run(module, features, cotangents)
    weight, bias = module.fusion.linear.weight, module.fusion.linear.bias
    expected = dgl_ext.fused_decouple(features, weight, bias)
    torch.autograd.backward(flat(expected), cotangents)
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, grads_of(module.fusion, features), 1e-12)


@pytest.mark.parametrize("case", ["transformer", "exchange", "batch-norm"])
def test_which_loss_reaches_what(case):
    module, features = make(case)
    out = module(*features)
    parameters = list(module.parameters())
    for k, z in enumerate(flat(out)):
        inputs = [*features, *parameters]
        found = torch.autograd.grad(
            z, inputs, torch.randn_like(z), retain_graph=True, allow_unused=True
        )
        reached = [grad is not None for grad in found]
        if k == 0:
            assert reached == [False] * len(features) + [True] * len(parameters)
        else:
            assert [i for i, there in enumerate(reached) if there] == [k - 1]


def test_running_statistics_are_those_of_the_fused_pass():
    module, features = make("batch-norm")
    norm = module.fusion.layers[1]
    hidden = module.fusion.layers[0](torch.cat(features, dim=-1)).detach()
    for _ in range(2):
        module(*features)
    assert norm.num_batches_tracked == 2
    mean = hidden.mean(0)
    torch.testing.assert_close(norm.running_mean, mean * 0.1 + mean * 0.1 * 0.9)


def test_every_pass_starts_from_the_same_buffers():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, *features):
            self.calls += 1
            return self.calls * sum(features)

    module = Decoupled(Counter())
    for call in (1.0, 2.0):
        out = module(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        assert out.unimodal[0].tolist() == out.unimodal[1].tolist() == [call, call]
        assert module.fusion.calls == call


def test_the_fused_output_is_that_of_the_module_alone_under_the_same_seed():
    module, features = make("transformer-dropout")
    torch.manual_seed(9)
    alone = module.fusion(*features)
    torch.manual_seed(9)
    assert torch.equal(module(*features).fused, alone)


def test_every_pass_draws_a_dropout_mask_of_its_own():
    module = Decoupled(nn.Sequential(Concat((3, 3), 50), nn.Dropout(0.5)), "self")
    module.fusion.forward = lambda a, b: module.fusion[1](module.fusion[0](a, b))
    x = torch.randn(6, 3)
    out = module(x, x)
    masks = [z == 0 for z in flat(out)]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (masks[0] != masks[1]).float().mean() > 0.3


def test_self_puts_the_feature_in_every_slot():
    torch.manual_seed(0)
    module = Decoupled(NormedMLP().double(), "self")
    module.fusion.layers[0] = nn.Linear(8, 8).double()
    features = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    twin = copy.deepcopy(module.fusion)
    cotangents = outputs_like(module, features)
    out, grads = run(module, features, cotangents)
    expected, expected_grads, _ = recipe(twin, features, cotangents, "self")
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, expected_grads, 1e-12)
    by_function = Decoupled(twin, lambda features, i: [features[i]] * 2)
    assert_same(run(by_function, features, cotangents)[1], grads, 1e-12)


def test_a_function_passes_no_gradient_but_the_feature_s_own():
    module, features = make("concat", substitute=Imputer())
    out = module(*features)
    a, b = features
    columns = module.fusion.linear.weight.detach().split([5, 4], dim=1)
    names = [f"features[{i}]" for i in range(2)] + [name for name, _ in module.named_parameters()]
    for i, (z, weight) in enumerate(zip(out.unimodal, columns, strict=True)):
        g = torch.randn_like(z)
        z.backward(g)
        expected = {**dict.fromkeys(names), f"features[{i}]": g @ weight}
        assert_same(grads_of(module, features), expected, 1e-12)
    full = [a, module.substitute.to_b(a) + b + module.substitute.token]
    assert_same({"z": out.unimodal[0]}, {"z": module.fusion(*full)}, 1e-12)


def test_a_parameter_that_a_function_returns_gets_no_gradient():
    imputer = Imputer()
    module, features = make(
        "concat", substitute=lambda h, i: (h[0], imputer.token) if i == 0 else (h[0].detach(), h[1])
    )
    z = module(*features).unimodal[0]
    z.backward(torch.randn_like(z))
    assert imputer.token.grad is None
    assert features[0].grad is not None


@pytest.mark.parametrize("case", ["transformer", "exchange", "batch-norm", "tied"])
def test_open_leaks_are_plain_autograd(case):
    module, features = make(case, encoder_leak=1.0, head_leak=1.0)
    twin = copy.deepcopy(module.fusion)
    cotangents = outputs_like(module, features)
    _, grads = run(module, features, cotangents)
    passes = [features, *(substituted(features, i) for i in range(len(features)))]
    torch.autograd.backward([twin(*inputs) for inputs in passes], cotangents)
    assert_same(grads, grads_of(twin, features), 1e-12)


def test_leaks_in_between_are_a_mixture():
    module, features = make("exchange", encoder_leak=0.25, head_leak=0.5)
    cotangents = outputs_like(module, features)
    _, mixed = run(module, features, cotangents)
    module.encoder_leak = module.head_leak = 0.0
    _, closed = run(module, features, cotangents)
    module.encoder_leak = module.head_leak = 1.0
    _, opened = run(module, features, cotangents)
    expected = {
        name: torch.lerp(closed[name], opened[name], 0.25 if name.startswith("features") else 0.5)
        for name in closed
    }
    assert_same(mixed, expected, 1e-12)


@pytest.mark.parametrize("shape", [(6,), (6, 2)], ids=str)
def test_absent_rows_are_not_read(shape):
    module, features = make("transformer")
    mask = torch.tensor([[True, False]] * 6) if len(shape) == 2 else torch.arange(6) % 3 > 0
    where = mask.reshape(shape + (1,) * (3 - len(shape))).expand(features[0].shape)
    cotangents = outputs_like(module, features)
    zeroed = [torch.where(where, features[0], 0.0).detach().requires_grad_(), features[1]]
    expected, expected_grads = run(module, zeroed, cotangents)
    with torch.no_grad():
        features[0].masked_fill_(~where, float("nan"))
    out, grads = run(module, features, cotangents, call=lambda *x: module(*x, present=[mask, None]))
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert not grads["features[0]"][~where].any()
    expected_grads["features[0]"] = expected_grads["features[0]"] * where
    assert_same(grads, expected_grads, 1e-12)


def test_any_structure_of_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.concat = Concat()

        def forward(self, *features):
            z = self.concat(*features)
            return {"logits": z, "parts": (z.mean(), torch.stack([z, z]))}

    torch.manual_seed(0)
    features = [torch.randn(6, 5, requires_grad=True), torch.randn(6, 4, requires_grad=True)]
    module = Decoupled(Two())
    out = module(*features)
    assert out.fused["parts"][1].shape == (2, 6, 3)
    out.unimodal[1]["parts"][0].backward()
    assert [h.grad is None for h in features] == [True, False]
    assert all(p.grad is None for p in module.parameters())


def test_features_without_gradient_and_frozen_parameters():
    module, features = make("exchange")
    module.fusion.joint.requires_grad_(False)
    features[0].requires_grad_(False)
    out = module(*features)
    assert not out.unimodal[0].requires_grad
    cotangents = cotangents_like(out)
    used = [(z, g) for z, g in zip(flat(out), cotangents, strict=True) if z.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    grads = grads_of(module.fusion, features)
    nones = [name for name, grad in grads.items() if grad is None]
    assert nones == ["features[0]", "joint.weight", "joint.bias"]


def test_hooks_run_in_every_pass():
    module, features = make("batch-norm")
    seen = []
    module.fusion.register_forward_hook(lambda m, args, z: seen.append(z))
    out = module(*features)
    assert [a is b for a, b in zip(seen, flat(out), strict=True)] == [True] * 3


def test_a_parameter_shared_with_an_encoder_is_cut_in_the_fusion_only():
    torch.manual_seed(0)
    concat = Concat((3, 4), 3).double()
    shared = concat.linear.weight
    module = Decoupled(concat)
    x = torch.randn(6, 7, dtype=torch.float64)
    b = torch.randn(6, 4, dtype=torch.float64)
    z = module(x @ shared.t(), b).unimodal[0]
    g = torch.randn_like(z)
    z.backward(g)
    expected = (g @ shared.detach()[:, :3]).t() @ x  # through the encoder's use alone
    assert_same({"grad": shared.grad}, {"grad": expected}, 1e-12)


def test_nested_as_an_encoder():
    """The inner module is trained by the outer one's unimodal loss, its encoders by its own."""
    torch.manual_seed(0)
    inner = Decoupled(Concat((5, 4), 3).double())
    outer = Decoupled(nn.Bilinear(3, 2, 3).double())
    a, b, c = (torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (5, 4, 2))
    first = inner(a, b)
    second = outer(first.fused, c)
    named = {"a": a, "b": b, "c": c, "inner": inner.fusion.linear.weight,
             "outer": outer.fusion.bias}  # fmt: skip
    reached = {}
    outputs = {"inner.a": first.unimodal[0], "inner.b": first.unimodal[1],
               "fused": second.fused, "outer.inner": second.unimodal[0]}  # fmt: skip
    for name, z in outputs.items():
        found = torch.autograd.grad(
            z, list(named.values()), torch.randn_like(z), retain_graph=True, allow_unused=True
        )
        reached[name] = [key for key, g in zip(named, found, strict=True) if g is not None]
    assert reached == {"inner.a": ["a"], "inner.b": ["b"], "fused": ["outer"],
                       "outer.inner": ["inner"]}  # fmt: skip


def test_a_head_of_this_package_inside():
    """Both cut: the inner head's unimodal outputs exist in each pass."""
    head = dgl_ext.nn.ConcatFusion((5, 4), 3, dtype=torch.float64)
    module, features = make("concat")
    module.fusion = head
    out = module(*features)
    assert_same({"z": out.unimodal[0].unimodal[0]}, {"z": head(*features).unimodal[0]}, 1e-12)
    out.unimodal[0].unimodal[0].backward(torch.randn(6, 3, dtype=torch.float64))
    assert head.weight.grad is None
    assert features[0].grad is not None


def test_repr():
    assert "(fusion): Concat(" in repr(Decoupled(Concat()))
    assert "substitute='zero'" in repr(Decoupled(Concat()))
    assert "leak" not in repr(Decoupled(Concat()))
    text = repr(Decoupled(Concat(), Imputer(), head_leak=0.5))
    assert "head_leak=0.5" in text
    assert "(substitute): Imputer(" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fusion": torch.add}, TypeError, "fusion: expected a torch.nn.Module, .*, got builtin"),
        ({"substitute": "mean"}, ValueError, "substitute: expected \"zero\", .*, got 'mean'"),
        ({"encoder_leak": 2}, ValueError, r"encoder_leak: expected a number in \[0, 1\], got 2"),
        ({"fusion": nn.LazyLinear(3)}, ValueError, 'lazy parameters, got "weight"'),
        ({"fusion": nn.LazyBatchNorm1d(affine=False)}, ValueError, 'got "running_mean"'),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Decoupled(**{"fusion": Concat(), **arguments})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused():
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(TypeError, match="not scripted, got TopLevelTracedModule"):
        Decoupled(scripted)


X, Y = torch.ones(6, 5), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        ((), {}, ValueError, "features: expected at least one tensor, got none"),
        ((X, 3), {}, TypeError, r"features\[1\]: expected a torch.Tensor, got int"),
        ((X, Y.long()), {}, TypeError, r"features\[1\]: expected one of .*, got torch.int64"),
        (
            (X, Y),
            {"substitute": "self"},
            ValueError,
            r'features\[1\]: expected shape \(6, 5\) as features\[0\] for substitute="self", '
            r"got \(6, 4\)",
        ),
        ((X, Y), {"present": X}, TypeError, "present: expected a sequence of bool tensors"),
        ((X, Y), {"present": [None]}, ValueError, "present: expected 2 entries, .*, got 1"),
        ((X, Y), {"present": [None, 1]}, TypeError, r"present\[1\]: expected a bool tensor"),
        ((X, Y), {"present": [X, None]}, TypeError, r"present\[0\]: expected torch.bool, got"),
        (
            (X, Y),
            {"present": [None, torch.ones(5).bool()]},
            ValueError,
            r"present\[1\]: expected the first dimensions of features\[1\], which is \(6, 4\), "
            r"got shape \(5,\)",
        ),
        (
            (X, Y),
            {"present": [torch.tensor(True), None]},
            ValueError,
            r"present\[0\]: expected the first dimensions of features\[0\], .* got shape \(\)",
        ),
        (
            (X, Y),
            {"present": [torch.ones(6, dtype=torch.bool, device="meta"), None]},
            ValueError,
            r"present\[0\]: expected device cpu, got meta",
        ),
        (
            (X, Y),
            {"substitute": lambda h, i: h[:1]},
            ValueError,
            "substitute: expected 2 features, one per modality, got 1",
        ),
        (
            (X, Y),
            {"substitute": lambda h, i: [x * 1 for x in h]},
            ValueError,
            r"substitute: expected features\[0\] itself in slot 0",
        ),
        (
            (X, Y),
            {"substitute": lambda h, i: [h[i], None] if i == 0 else [None, h[i]]},
            TypeError,
            r"substitute\[1\]: expected a torch.Tensor, got NoneType",
        ),
        ((X, Y), {"substitute": lambda h, i: h[i]}, TypeError, "substitute: expected a sequence"),
    ],
)
def test_bad_calls(features, options, error, message):
    module = Decoupled(Concat(), options.get("substitute", "zero"))
    with pytest.raises(error, match=message):
        module(*features, present=options.get("present"))


def test_docstring_example():
    result = doctest.testmod(decoupled, extraglobs={"torch": torch, "dgl_ext": dgl_ext})
    assert result.attempted > 0
    assert result.failed == 0

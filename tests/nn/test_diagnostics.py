"""Attenuation and routing: values by hand, planted faults, and that nothing is disturbed."""

from __future__ import annotations

import copy
import doctest
import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from fusion_modules import make
from support.problems import assert_same, each_output, make_problem
from support.two_pass import plain_head, plain_unimodal
from torch import nn

import dgl_ext
from dgl_ext import diagnostics
from dgl_ext._arguments.heads import HEADS
from dgl_ext.diagnostics import (
    Attenuation,
    AttenuationMonitor,
    attenuation,
    plot_attenuation,
)
from dgl_ext.nn import MODULES
from dgl_ext.nn.decoupled import Decoupled

TARGET = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def cross_entropy(z):
    return F.cross_entropy(z, TARGET[: len(z)])


def by_hand(fused, unimodal, alphas):
    """From gradients, one per modality."""
    scaled = [g * a for g, a in zip(unimodal, alphas, strict=True)]
    norms = [torch.stack([g.square().sum().sqrt() for g in grads]) for grads in (fused, scaled)]
    dots = torch.stack([(a * b).sum() for a, b in zip(fused, scaled, strict=True)])
    return Attenuation(*norms, norms[0] / norms[1], dots / (norms[0] * norms[1]))


def plain(problem, alphas):
    """The same through the head as one writes it without the method."""
    features = problem.features
    fused = torch.autograd.grad(cross_entropy(plain_head(problem, features)), features)
    unimodal = [
        torch.autograd.grad(cross_entropy(plain_unimodal(problem, i)), h)[0]
        for i, h in enumerate(features)
    ]
    return by_hand(fused, unimodal, alphas)


def module_of(problem):
    module = MODULES[problem.fusion]((5, 4), 3, dtype=torch.float64)
    tensors = [t for pair in zip(problem.weights, problem.biases, strict=True) for t in pair]
    module.load_state_dict(dict(zip(module.state_dict(), tensors, strict=True)))
    return module


@pytest.mark.parametrize("alpha", [1.0, (3.0, 0.5), (-2, 1)], ids=str)
def test_attenuation_of_the_heads(fusion, alpha):
    problem = make_problem(fusion)
    alphas = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    expected = plain(problem, alphas)._asdict()
    function = functools.partial(
        dgl_ext.fused_decouple, weight=problem.weight, bias=problem.bias, fusion=fusion
    )
    for head in (module_of(problem), function):
        found = attenuation(head, problem.features, each_output(cross_entropy), alpha=alpha)
        assert_same(found._asdict(), expected, 1e-12)
        assert found.ratio.dtype == torch.float64


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
def test_the_leaks_of_a_head_change_nothing(fusion, leaks):
    problem = make_problem(fusion)
    module = module_of(problem)
    module.encoder_leak, module.head_leak = leaks
    found = attenuation(module, problem.features, each_output(cross_entropy))
    assert_same(found._asdict(), plain(problem, (1, 1))._asdict(), 1e-12)


@pytest.mark.parametrize("case", ["transformer", "three-transformer", "exchange", "batch-norm"])
def test_attenuation_of_a_decoupled_module(case):
    module, features = make(case, encoder_leak=0.5)
    twin = copy.deepcopy(module.fusion)
    fused = torch.autograd.grad(cross_entropy(twin(*features)), features)
    unimodal = []
    for i, h in enumerate(features):
        alone = [x if i == j else torch.zeros_like(x) for j, x in enumerate(features)]
        unimodal.append(torch.autograd.grad(cross_entropy(twin(*alone)), h)[0])
    found = attenuation(module, features, each_output(cross_entropy), alpha=2.0)
    expected = by_hand(fused, unimodal, [2.0] * len(features))
    assert_same(found._asdict(), expected._asdict(), 1e-12)


def test_a_feature_that_explains_the_label_attenuates_the_other():
    """What the method is about, on numbers that one can follow."""
    target = torch.tensor([0, 1, 0, 1])
    strong = F.one_hot(target, 2).double() * 10
    weak = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = functools.partial(dgl_ext.fused_decouple, weight=torch.eye(2).double().repeat(1, 2))
    found = attenuation(head, (strong, weak), each_output(lambda z: F.cross_entropy(z, target)))
    assert found.ratio[1] < 1e-2
    assert 0.1 < found.ratio[0] < 10


def test_losses_of_their_own_and_absent_rows(fusion):
    problem = make_problem(fusion)
    present = [torch.tensor([True, False, True, True, True, False, True]), None]

    def first(z):
        return F.cross_entropy(z[present[0]], TARGET[present[0]])

    losses = [cross_entropy, first, cross_entropy]
    masked = problem.map(lambda tensor: tensor)
    with torch.no_grad():
        masked.features[0][~present[0]] = 0
    fused = torch.autograd.grad(cross_entropy(plain_head(masked, masked.features)), masked.features)
    fused = (torch.where(present[0][:, None], fused[0], 0.0), fused[1])
    unimodal = [
        torch.autograd.grad(loss(plain_unimodal(masked, i)), masked.features[i])[0]
        for i, loss in enumerate(losses[1:])
    ]
    with torch.no_grad():
        problem.features[0][~present[0]] = float("nan")
    found = attenuation(module_of(problem), problem.features, each_output(*losses), present=present)
    assert_same(found._asdict(), by_hand(fused, unimodal, (1, 1))._asdict(), 1e-12)
    features, (weights, biases) = problem.features, (problem.weight, problem.bias)
    function = functools.partial(dgl_ext.fused_decouple, weight=weights, bias=biases, fusion=fusion)
    again = attenuation(function, features, each_output(*losses), present=present)
    assert_same(again._asdict(), found._asdict(), 1e-12)
    module = Decoupled(nn.Bilinear(5, 4, 3).double())
    assert (
        attenuation(module, features, each_output(*losses), present=present)
        .fused_norm.isfinite()
        .all()
    )


def test_16_bit_features_give_float64_that_does_not_underflow():
    problem = make_problem("concat", dtype=torch.float32)
    half = problem.to(torch.bfloat16)
    head = functools.partial(dgl_ext.fused_decouple, weight=half.weight, bias=half.bias)
    found = attenuation(
        head, half.features, each_output(lambda z: 1e-15 * cross_entropy(z.float()))
    )
    assert found.ratio.dtype == torch.float64
    expected = plain(make_problem("concat"), (1, 1))
    torch.testing.assert_close(found.ratio.double(), expected.ratio, rtol=0.05, atol=0)
    torch.testing.assert_close(found.cosine.double(), expected.cosine, rtol=0, atol=0.05)


def test_a_loss_that_does_not_depend_on_a_feature_sends_zero():
    problem = make_problem("sum")
    head = functools.partial(
        dgl_ext.fused_decouple, weight=problem.weight, bias=problem.bias, fusion="sum"
    )
    constant = torch.ones((), dtype=torch.float64)
    losses = [cross_entropy, lambda z: constant, cross_entropy]
    found = attenuation(head, problem.features, each_output(*losses))
    assert found.unimodal_norm[0] == 0 < found.unimodal_norm[1]
    assert found.ratio[0].isinf()
    assert found.cosine.isnan().tolist() == [True, False]


def heads_and_features():
    for fusion in HEADS:
        problem = make_problem(fusion)
        yield module_of(problem), problem.features
    for case in ("transformer-dropout", "batch-norm-dropout", "exchange"):
        yield make(case)


def test_nothing_is_disturbed():
    for head, features in heads_and_features():
        fired = []
        for tensor in (*features, *head.parameters()):
            tensor.grad = torch.randn_like(tensor)
            tensor.register_hook(fired.append)
        grads = [t.grad.clone() for t in (*features, *head.parameters())]
        before = copy.deepcopy(head.state_dict())
        state = torch.get_rng_state()
        with torch.no_grad():  # as in validation
            found = attenuation(
                head,
                features,
                each_output(lambda z: cross_entropy(F.dropout(z, 0.5))),
                alpha=(1.0, 2.0),
            )
        assert found.fused_norm.all()
        assert torch.equal(torch.get_rng_state(), state)
        assert fired == []
        assert_same(head.state_dict(), before, 0.0)
        for tensor, grad in zip((*features, *head.parameters()), grads, strict=True):
            assert torch.equal(tensor.grad, grad)
        assert head.training


def test_a_training_step_is_the_same_with_and_without_it():
    def step(measured):
        module, features = make("batch-norm-dropout")
        torch.manual_seed(3)
        out = module(*features)
        if measured:
            attenuation(module, features, each_output(cross_entropy))
        loss = sum(map(cross_entropy, (out.fused, *out.unimodal)))
        loss.backward()
        tensors = {f"h{i}": h.grad for i, h in enumerate(features)}
        tensors |= {name: p.grad for name, p in module.named_parameters()}
        return {**tensors, **dict(module.named_buffers()), "next": torch.randn(3)}

    assert_same(step(True), step(False), 0.0)


def test_nothing_waits_for_the_device(monkeypatch):
    """On a GPU each of these would wait until the device has caught up."""
    cases = list(heads_and_features())
    monitor = AttenuationMonitor()

    def wait(*args, **kwargs):
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__",
                     "__int__", "__index__"):  # fmt: skip
            patch.setattr(torch.Tensor, name, wait)
        for head, features in cases:
            monitor.step(head, features, each_output(lambda z: z.square().mean()), alpha=(2.0, 1.0))
        with pytest.raises(AssertionError, match="waits"):
            float(cases[0][1][0].sum())
    assert len(monitor.history) == len(cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_a_gpu():
    cases = [
        (head.cuda(), [h.detach().cuda() for h in features])
        for head, features in heads_and_features()
    ]
    target = TARGET[:6].cuda()
    state = torch.cuda.get_rng_state()
    for head, features in cases:
        features = [h[:6] for h in features]
        attenuation(head, features, each_output(lambda z: F.cross_entropy(z, target)))  # warms up
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = attenuation(head, features, each_output(lambda z: F.cross_entropy(z, target)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.ratio.is_cuda
        assert found.ratio.isfinite().all()
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_monitor_measures_every_kth_step():
    monitor = AttenuationMonitor(every=3)
    problem = make_problem("concat")
    head = module_of(problem)
    measured = [monitor.step(head, problem.features, each_output(cross_entropy)) for _ in range(7)]
    assert [m is not None for m in measured] == [True, False, False] * 2 + [True]
    assert [step for step, _ in monitor.history] == [0, 3, 6]
    expected = attenuation(head, problem.features, each_output(cross_entropy))
    assert_same(monitor.history[1][1]._asdict(), expected._asdict(), 0.0)


X, Y = torch.randn(7, 5), torch.randn(7, 4)
HEAD = dgl_ext.nn.ConcatFusion((5, 4), 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": nn.Linear(9, 3)}, TypeError, "head: expected a module of dgl_ext.nn .* Linear"),
        ({"head": 3}, TypeError, "head: expected a module of dgl_ext.nn .* got int"),
        (
            {"head": lambda h, encoder_leak: h[0]},
            TypeError,
            "head: expected it to return DecoupledLogits, got Tensor",
        ),
        ({"features": X}, TypeError, "features: expected a sequence of tensors"),
        ({"features": ()}, ValueError, "features: expected at least one tensor, got none"),
        ({"features": (X, TARGET)}, TypeError, r"features\[1\]: expected one of .*int64"),
        (
            {"loss_fn": lambda head, features: {"fused": cross_entropy(head(*features).fused)}},
            ValueError,
            "loss_fn: expected 3 losses, the fused output's and one per modality, got 1",
        ),
        ({"loss_fn": lambda *_: [1.0]}, TypeError, "loss_fn: expected it to return a dict .* list"),
        ({"loss_fn": lambda *_: {}}, TypeError, "got dict without entries"),
        (
            {"loss_fn": each_output(lambda z: 1.0)},
            TypeError,
            'loss_fn: "0": expected a scalar tensor, got float',
        ),
        (
            {"loss_fn": each_output(lambda z: z)},
            ValueError,
            r'loss_fn: "0": expected a scalar .* \(7, 3\)',
        ),
        ({"alpha": (1.0,)}, ValueError, "alpha: expected 2 numbers, one per modality, got 1"),
        ({"alpha": (1.0, "2")}, TypeError, r"alpha\[1\]: expected a number, got str"),
        ({"alpha": None}, TypeError, "alpha: expected a number, or a sequence"),
    ],
)
def test_bad_arguments_of_attenuation(arguments, error, message):
    good = {"head": HEAD, "features": (X, Y), "loss_fn": each_output(cross_entropy)}
    with pytest.raises(error, match=message):
        attenuation(**{**good, **arguments})


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (2.0, TypeError)])
def test_bad_periods(every, error):
    with pytest.raises(error, match="every: expected"):
        AttenuationMonitor(every=every)


def monitored():
    monitor = AttenuationMonitor(every=2)
    problem = make_problem("concat")
    for k in range(5):
        losses = lambda z, k=k: cross_entropy(z * (1 + k))  # noqa: E731
        monitor.step(module_of(problem), problem.features, each_output(losses))
    return monitor


def test_plot_writes_a_picture(tmp_path):
    path = tmp_path / "attenuation.png"
    figure = plot_attenuation(monitored(), path, names=["audio", "video"])
    assert path.read_bytes().startswith(b"\x89PNG")
    norms, ratios, cosines = figure.axes
    labels = [text.get_text() for text in norms.get_legend().get_texts()]
    assert labels[:2] == ["audio, fused", "video, fused"]
    assert list(cosines.lines[0].get_xdata()) == [0, 2, 4]
    history = monitored().history
    expected = [found.ratio[1].item() for _, found in history]
    assert list(ratios.lines[1].get_ydata()) == expected


def test_plot_draws_ratios_into_axes():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert plot_attenuation(monitored().history, axes) is axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["modality 0", "modality 1"]
    assert list(axes.lines[0].get_xdata()) == [0, 2, 4]


def test_plot_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="history: expected at least one measurement"):
        plot_attenuation([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="names: expected 2, one per modality, got 1"):
        plot_attenuation(monitored(), tmp_path / "x.png", names=["audio"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_attenuation needs matplotlib: pip install"):
        plot_attenuation(monitored(), tmp_path / "x.png")


def test_docstring_examples():
    for module in (diagnostics._attenuation, diagnostics._routing):
        result = doctest.testmod(module, extraglobs={"torch": torch, "dgl_ext": dgl_ext})
        assert result.attempted > 0
        assert result.failed == 0

"""Diagnostics of compiled models, odd buffers, pending graphs, inference mode and huge norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.problems import assert_same, each_output
from torch import nn
from torch.nn.utils import parametrizations

import dgl_ext
from dgl_ext.diagnostics import attenuation, routing
from dgl_ext.nn import Decoupled

LOSSES = ("fused", "audio", "video")
EXPECT = {"head.*": "fused", "audio.*": "audio", "video.*": "video"}


class Model(nn.Module):
    """Two encoders with batch norm, and a head."""

    def __init__(self, fusion: str = "sum") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.audio, self.video = (
            nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width)) for width in (4, 5)
        )
        self.head = dgl_ext.nn.MODULES[fusion]((4, 5), 6)

    def forward(self, x):
        return self.head(self.audio(x), self.video(x))


def losses(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x)
    values = [z.cos().mean() for z in (out.fused, *out.unimodal)]
    return dict(zip(LOSSES, values, strict=True))


def compiled_inside(model: Model) -> nn.Module:
    model.head = torch.compile(model.head, backend="aot_eager")
    return model


def compiled_in_place(model: Model) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="aot_eager"),
    "twice": lambda model: torch.compile(compiled_inside(model), backend="aot_eager"),
    "head": compiled_inside,
    "in place": compiled_in_place,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_has_the_table_of_the_plain_one(how, fusion):
    x = torch.randn(7, 3)
    plain = routing(Model(fusion), x, losses, EXPECT)
    model = COMPILED[how](Model(fusion))
    found = routing(model, x, losses, EXPECT)
    assert found.leaked == found.missing == []
    assert [row.name for row in found.rows] == [row.name for row in plain.rows]
    for ours, theirs in zip(found.rows, plain.rows, strict=True):
        assert ours.norms == pytest.approx(theirs.norms)
        assert ours.expected == theirs.expected
    raw = {f"_orig_mod.{pattern}": loss for pattern, loss in EXPECT.items()}
    assert routing(model, x, losses, raw) == found
    model(x)  # compiled as before


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        self.seen.resize_(len(x)).copy_(x[:, 0].detach())
        return x


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("none", None)
        self.register_buffer("count", torch.tensor(3), persistent=False)

    def forward(self, x):
        self.scale, self.none = self.scale * 2, torch.ones(2)
        self.count += 1
        return x * self.scale


class Adding(nn.Module):
    def forward(self, x):
        self.register_buffer("last", x.detach())
        return x


def with_inference_buffer() -> nn.Module:
    module = nn.BatchNorm1d(4)
    with torch.inference_mode():
        module.running_mean = torch.randn(4)
    return module.eval()


ODD = {
    "resized": Resizing,
    "replaced": Replacing,
    "added": Adding,
    "of inference mode": with_inference_buffer,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_buffers_are_what_they_were(name):
    model = Model()
    model.audio.append(ODD[name]())
    places = {
        (owner, key): (buffer, None if buffer is None else buffer.clone())
        for owner in model.modules()
        for key, buffer in owner._buffers.items()
    }
    assert routing(model, torch.randn(6, 3), losses, EXPECT).leaked == []
    for (owner, key), (buffer, copy) in places.items():
        assert owner._buffers[key] is buffer
        assert buffer is None or torch.equal(buffer, copy)
    assert {key for owner in model.modules() for key in owner._buffers} == {
        key for _, key in places
    }


def test_buffers_come_back_after_an_error():
    model = Model()
    before = dict(model.named_buffers())

    def fail(model, x):
        model(x)
        raise KeyError("no")

    with pytest.raises(KeyError):
        routing(model, torch.randn(6, 3), fail)
    after = dict(model.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_a_pending_graph_is_not_disturbed(training):
    model, x = Model().train(training), torch.randn(6, 3)
    pending = sum(losses(model, x).values())
    routing(model, x, losses)
    features = torch.randn(6, 4), torch.randn(6, 5)
    attenuation(model.head, features, each_output(torch.Tensor.mean))
    pending.backward()
    assert model.audio[0].weight.grad.any()


@pytest.mark.parametrize(
    ("expect", "error", "message"),
    [
        (["fused"], TypeError, "expect: expected a dict of losses by pattern, got list"),
        ({3: "fused"}, TypeError, "expect: expected patterns of parameter names, got int"),
        (
            {"head.*": None},
            TypeError,
            'expect["head.*"]: expected the name of a loss, or a sequence of them, got NoneType',
        ),
        (
            {"head.*": [1]},
            ValueError,
            'expect["head.*"]: expected one of "fused", "audio", "video", got 1',
        ),
    ],
)
def test_what_is_expected_is_checked(expect, error, message):
    with pytest.raises(error) as raised:
        routing(Model(), torch.randn(6, 3), losses, expect)
    assert str(raised.value) == message


def target_loss(z: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_outside(mode, fusion):
    """The truth, also of features that inference mode has made."""
    head = Model(fusion).head
    features = torch.randn(6, 4), torch.randn(6, 5)
    expected = attenuation(head, features, each_output(target_loss))
    assert expected.fused_norm.all()
    with mode():
        made = [h * 1 for h in features]
        found = attenuation(head, made, each_output(target_loss))
    assert_same(found._asdict(), expected._asdict(), 1e-12)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_norms_beyond_float32(scale, fusion):
    head = Model(fusion).head
    features = torch.randn(60, 4), torch.randn(60, 5)
    expected = attenuation(head, features, each_output(target_loss))
    found = attenuation(head, features, each_output(lambda z: scale * target_loss(z)))
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours / scale, theirs, rtol=1e-5, atol=0)


def test_huge_alpha():
    head, features = Model().head, (torch.randn(6, 4), torch.randn(6, 5))
    plain = attenuation(head, features, each_output(target_loss))
    found = attenuation(head, features, each_output(target_loss), alpha=(1e60, -1e-60))
    torch.testing.assert_close(found.unimodal_norm[0] / 1e60, plain.unimodal_norm[0])
    torch.testing.assert_close(found.unimodal_norm[1] / 1e-60, plain.unimodal_norm[1])
    torch.testing.assert_close(found.cosine, plain.cosine * torch.tensor([1.0, -1.0]).double())


@pytest.mark.parametrize("wrapped", [False, True])
def test_buffers_of_parametrizations_are_not_written(wrapped):
    head = dgl_ext.nn.SumFusion((4, 5), 6)
    parametrizations.spectral_norm(head.linears[1])
    if wrapped:
        layer = parametrizations.spectral_norm(nn.Bilinear(4, 5, 6))
        head = Decoupled(layer)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    assert before
    attenuation(head.train(), (torch.randn(6, 4), torch.randn(6, 5)), each_output(target_loss))
    for name, buffer in head.named_buffers():
        assert torch.equal(buffer, before[name]), name

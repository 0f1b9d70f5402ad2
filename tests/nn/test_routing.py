"""The routing table: what it says of sound and of faulty models, and that it disturbs nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.problems import assert_same
from torch import nn

import dgl_ext
from dgl_ext.diagnostics import routing
from dgl_ext.nn.decoupled import Decoupled

EXPECT = {"audio.*": "audio", "video.*": "video", "fusion.*": "fused"}
LOSSES = ("fused", "audio", "video")


class Model(nn.Module):
    """Two encoders with batch norm and dropout, and a head."""

    def __init__(self, fusion=None):
        super().__init__()
        self.audio, self.video = (
            nn.Sequential(nn.Linear(6, n), nn.BatchNorm1d(n), nn.Dropout(0.2)) for n in (5, 4)
        )
        self.fusion = fusion or dgl_ext.nn.ConcatFusion((5, 4), 3)

    def forward(self, x):
        return self.fusion(self.audio(x), self.video(x))


def make(fusion=None):
    torch.manual_seed(0)
    return Model(fusion), (torch.randn(8, 6), torch.randint(3, (8,)))


def losses(model, batch):
    x, target = batch
    out = model(x)
    values = [F.cross_entropy(z, target) for z in (out.fused, *out.unimodal)]
    return dict(zip(LOSSES, values, strict=True))


class PlainConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(9, 3)

    def forward(self, a, b):
        return self.linear(torch.cat([a, b], dim=-1))


@pytest.mark.parametrize("fusion", [None, PlainConcat], ids=["op", "Decoupled"])
def test_a_sound_model(fusion):
    model, batch = make(fusion and Decoupled(fusion()))
    found = routing(model, batch, losses, EXPECT)
    names = [name for name, _ in model.named_parameters()]
    assert [row.name for row in found.rows] == names
    assert found.losses == LOSSES
    assert found.leaked == found.missing == found.unreached == found.unmatched == found.frozen == []
    for loss, prefix in zip(LOSSES, ("fusion", "audio", "video"), strict=True):
        assert found.reached_by(loss) == [name for name in names if name.startswith(prefix)]
    assert all(row.remarks == [] for row in found.rows)


def test_norms_are_those_of_autograd():
    model, batch = make()
    torch.manual_seed(4)
    found = routing(model, batch, losses)
    torch.manual_seed(4)
    values = losses(model, batch)
    named = dict(model.named_parameters())
    for name, loss in values.items():
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True,
                                    allow_unused=True)  # fmt: skip
        for row, grad in zip(found.rows, grads, strict=True):
            expected = None if grad is None else grad.norm().item()
            assert row.norms[name] == pytest.approx(expected)


def leaky(model, batch):
    """As a bare model is trained when names do not match: every loss reaches everything."""
    x, target = batch
    h = [model.audio(x), model.video(x)]
    weight, bias = model.fusion.weight, model.fusion.bias
    inputs = [h, [h[0], torch.zeros_like(h[1])], [torch.zeros_like(h[0]), h[1]]]
    values = [
        F.cross_entropy(F.linear(torch.cat(pair, 1), weight, bias), target) for pair in inputs
    ]
    return dict(zip(LOSSES, values, strict=True))


def test_a_planted_leak_is_found():
    model, batch = make()
    found = routing(model, batch, leaky, EXPECT)
    encoders = [n for n, _ in model.named_parameters() if not n.startswith("fusion")]
    expected = [(name, "fused") for name in encoders]
    expected += [
        (f"fusion.linear.{n}", loss) for n in ("weight", "bias") for loss in ("audio", "video")
    ]
    assert found.leaked == expected
    assert found.missing == []
    assert "leaked: audio, leaked: video" in str(found).splitlines()[-1]


def test_a_leak_of_a_head_is_found_and_small_ones_too():
    model, batch = make(dgl_ext.nn.ConcatFusion((5, 4), 3, encoder_leak=1e-6))
    found = routing(model, batch, losses, EXPECT)
    assert {loss for _, loss in found.leaked} == {"fused"}
    assert {name.split(".")[0] for name, _ in found.leaked} == {"audio", "video"}


def test_frozen_missing_unreached_and_unmatched():
    model, batch = make()
    model.spare = nn.Linear(2, 2)
    model.video[0].weight.requires_grad_(False)
    model.audio.register_forward_hook(lambda m, args, out: out.detach())
    found = routing(model, batch, losses, EXPECT)
    audio = [name for name, _ in model.named_parameters() if name.startswith("audio")]
    assert found.frozen == ["video.0.weight"]
    assert found.unreached == [*audio, "video.0.weight", "spare.weight", "spare.bias"]
    assert found.missing == [*((n, "audio") for n in audio), ("video.0.weight", "video")]
    assert found.unmatched == ["spare.weight", "spare.bias"]
    remarks = {row.name: row.remarks for row in found.rows}
    assert remarks["video.0.weight"] == ["frozen", "missing: video"]
    assert remarks["audio.0.bias"] == ["unreached", "missing: audio"]


def test_zero_is_not_none():
    model, batch = make()
    nn.init.zeros_(model.fusion.weight)
    found = routing(model, batch, losses, EXPECT)
    assert ("audio.0.weight", "audio") in found.zero
    assert "audio.0.weight" in found.reached_by("audio")
    assert found.missing == []
    row = next(line for line in str(found).splitlines() if line.startswith("audio.0.weight"))
    assert row.split() == ["audio.0.weight", "-", "0", "-"]


def test_the_first_pattern_counts_and_several_losses_may_be_expected():
    model, batch = make()
    expect = {"fusion.linear.bias": ["fused", "audio"], "fusion.*": "fused", "*": LOSSES[1:]}
    found = routing(model, batch, losses, expect)
    rows = {row.name: row.expected for row in found.rows}
    assert rows["fusion.linear.bias"] == ("fused", "audio")
    assert rows["fusion.linear.weight"] == ("fused",)
    assert found.missing[-1] == ("fusion.linear.bias", "audio")


def test_the_table():
    model, batch = make()
    lines = str(routing(model, batch, losses)).splitlines()
    assert lines[0].split() == ["parameter", *LOSSES]
    assert len(lines) == 1 + len(list(model.parameters()))
    assert "unmatched" not in "".join(lines)
    weight = next(line for line in lines if line.startswith("fusion.linear.weight")).split()
    assert float(weight[1]) > 0
    assert weight[2:] == ["-", "-"]
    assert "\n" in str(routing(model, batch, losses, EXPECT))


def test_nothing_is_disturbed():
    model, batch = make(Decoupled(nn.Bilinear(5, 4, 3)))
    model.register_buffer("calls", torch.zeros(()))

    def counted(model, batch):
        model.calls = model.calls + 1  # replaced, not written
        return losses(model, batch)

    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls = model.calls
    with torch.no_grad():
        assert routing(model, batch, counted, EXPECT).unreached == []
    assert model.calls is calls
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(model.state_dict(), before, 0.0)
    assert_same({name: p.grad for name, p in model.named_parameters()}, grads, 0.0)


def test_buffers_are_put_back_after_an_error():
    model, batch = make()
    before = copy.deepcopy(model.state_dict())

    def failing(model, batch):
        losses(model, batch)
        raise KeyError("loss")

    with pytest.raises(KeyError):
        routing(model, batch, failing)
    assert_same(model.state_dict(), before, 0.0)


def test_sparse_gradients_tied_parameters_and_constant_losses():
    embedding = nn.Embedding(5, 3, sparse=True)
    model = nn.ModuleDict({"one": embedding, "two": nn.Linear(3, 5, bias=False), "same": embedding})

    def loss_fn(model, batch):
        h = model["one"](batch)
        return {"loss": model["two"](h).square().mean(), "constant": torch.ones(())}

    found = routing(model, torch.tensor([0, 1, 1, 4]), loss_fn)
    assert [row.name for row in found.rows] == ["one.weight", "two.weight"]
    assert all(row.norms["loss"] > 0 for row in found.rows)
    assert found.reached_by("constant") == []


def test_a_data_parallel_model_is_looked_into(one_process):
    model, batch = make()
    parallel = nn.parallel.DistributedDataParallel(model)
    found = routing(parallel, batch, losses, EXPECT)
    assert found.leaked == found.missing == found.unmatched == []
    sum(losses(parallel, batch).values()).backward()  # training goes on
    assert model.fusion.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": losses}, TypeError, "model: expected a torch.nn.Module, got function"),
        ({"loss_fn": lambda m, b: m(b[0]).fused}, TypeError, "a dict of losses, got Tensor"),
        ({"loss_fn": lambda m, b: {}}, TypeError, "got dict without entries"),
        ({"loss_fn": lambda m, b: {"x": 1.0}}, TypeError, 'loss_fn: "x": expected a scalar .* fl'),
        (
            {"loss_fn": lambda m, b: {"x": m(b[0]).fused}},
            ValueError,
            r'loss_fn: "x": expected a scalar tensor, got shape \(8, 3\)',
        ),
        (
            {"expect": {"fusion.*": "fuse"}},
            ValueError,
            r'expect\["fusion.\*"\]: expected one of "fused", "audio", "video", got \'fuse\'',
        ),
        (
            {"expect": {"module.fusion.*": "fused"}},
            ValueError,
            r'expect: pattern "module.fusion.\*" matches no parameter',
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    model, batch = make()
    with pytest.raises(error, match=message):
        routing(**{"model": model, "batch": batch, "loss_fn": losses, **arguments})


def test_an_unknown_loss():
    model, batch = make()
    with pytest.raises(ValueError, match=r"loss: expected one of .*, got 'text'"):
        routing(model, batch, losses).reached_by("text")

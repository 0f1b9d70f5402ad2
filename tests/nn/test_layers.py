"""Heads whose layers are more than nn.Linear, and tensors that act for themselves."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.problems import assert_same, flat
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dgl_ext
from dgl_ext import functional

WIDTHS, CLASSES, ROWS = (6, 4), 5, 8
PRESENT = (torch.arange(ROWS) % 3 > 0, None)
LEAKS = [(0.0, 0.0), (0.5, 0.25)]


class Adapter(nn.Module):
    """A layer of low rank beside a frozen one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> Tensor:
        return self.base.weight + self.up.weight @ self.down.weight


def adapt(layer: nn.Linear) -> nn.Module:
    return Adapter(layer)


def hook(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


def patch(layer: nn.Linear) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x) - 1
    return layer


def cut_off(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def normed_by_hooks(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def normed(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


CHANGES = [adapt, hook, patch, cut_off, normed_by_hooks, normed]


def make(fusion: str, change=None, **options) -> nn.Module:
    torch.manual_seed(5)
    head = dgl_ext.nn.MODULES[fusion](WIDTHS, CLASSES, **options).double()
    if change is None:
        return head
    for name, layer in list(head.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(head.get_submodule(parent), leaf, change(layer).double())
    return head


def draw(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(ROWS, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for width in WIDTHS
    ]


def plain_logits(head: nn.Module, features: list[Tensor]) -> tuple[Tensor, ...]:
    """All logits through the layers as they are, nothing cut off."""
    call = head.get_submodule
    if head.fusion == "concat":
        zeros = [torch.zeros_like(h) for h in features]
        rows = [features, [features[0], zeros[1]], [zeros[0], features[1]]]
        return tuple(call("linear")(torch.cat(row, dim=1)) for row in rows)
    if head.fusion == "sum":
        alone = [call(f"linears.{i}")(h) for i, h in enumerate(features)]
        return (alone[0] + alone[1], *alone)
    (x, y), out = features, []
    for a, b in ((x, y), (x, torch.zeros_like(y)), (torch.zeros_like(x), y)):
        gamma, beta = call("film")(a).chunk(2, dim=1)
        out.append(call("out")(gamma * b + beta))
    return tuple(out)


def totals(logits: tuple[Tensor, ...], seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(z.shape, dtype=z.dtype, generator=generator) for z in logits]
    return [(z * c).sum() for z, c in zip(logits, draws, strict=True)]


@pytest.mark.parametrize("leaks", LEAKS)
@pytest.mark.parametrize("change", CHANGES)
def test_layers_compute_and_learn_what_they_are(fusion, change, leaks):
    encoder_leak, head_leak = leaks
    head = make(fusion, change, encoder_leak=encoder_leak, head_leak=head_leak)
    features = draw()
    expected = plain_logits(head, features)
    logits = flat(head(*features))
    assert_same(dict(enumerate(logits)), dict(enumerate(expected)), 1e-12)
    parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}

    def grads(total: Tensor, inputs) -> list[Tensor]:
        return torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True,
                                   allow_unused=True)  # fmt: skip

    fused, *alone = totals(expected)
    of_parameters = dict(zip(parameters, grads(fused, list(parameters.values())), strict=True))
    for total in alone:
        for name, grad in zip(parameters, grads(total, list(parameters.values())), strict=True):
            of_parameters[name] = of_parameters[name] + head_leak * grad
    of_features = {
        i: grads(alone[i], [h])[0] + encoder_leak * grads(fused, [h])[0]
        for i, h in enumerate(features)
    }
    sum(totals(logits)).backward()
    assert_same({i: h.grad for i, h in enumerate(features)}, of_features, 1e-11)
    assert_same({name: p.grad for name, p in parameters.items()}, of_parameters, 1e-11)
    assert any(grad.any() for grad in of_parameters.values())


@pytest.mark.parametrize("present", [None, PRESENT])
def test_a_step_with_an_adapter_is_that_of_merged_weights(fusion, present):
    head, merged = make(fusion, adapt), make(fusion)
    pairs = zip(head._layers(), merged._layers(), strict=True)
    for adapter, layer in pairs:
        layer.load_state_dict({"weight": adapter.merged(), "bias": adapter.base.bias})
    target = torch.arange(ROWS) % CLASSES
    found = {}
    for name, module in (("adapter", head), ("merged", merged)):
        features = draw()
        loss = module(*features, target=target, present=present, alpha=0.5)
        loss.total.backward()
        found[name] = dict(enumerate((*loss.unimodal, *(h.grad for h in features), loss.correct)))
    assert_same(found["adapter"], found["merged"], 1e-12)


def test_a_parametrized_weight_is_computed_once(fusion):
    head = make(fusion)
    calls = []

    class Count(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight

    layer = head._layers()[-1]
    nn.utils.parametrize.register_parametrization(layer, "weight", Count())
    calls.clear()
    head(*draw())
    assert calls == [1]


def test_an_explicit_backend_needs_plain_layers(fusion):
    head = make(fusion, adapt, backend="fused")
    with pytest.raises(ValueError, match=r'got Adapter as \w+[.\d]*: use backend="reference"'):
        head(*draw())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_layer_is_an_error(fusion):
    with pytest.raises(TypeError, match="expected a layer that is not scripted"):
        make(fusion, torch.jit.script)(*draw())


def test_quantised_layers(fusion):
    head = make(fusion).float().eval()
    model = nn.ModuleDict({"head": head})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)["head"]
        features = [h.detach().float() for h in draw()]
        ours, exact = quantised(*features), head(*features)
        theirs = plain_logits(quantised, features)
    assert_same(dict(enumerate(flat(ours))), dict(enumerate(theirs)), 0)
    assert_same(dict(enumerate(flat(ours))), dict(enumerate(flat(exact))), 0.1)


@pytest.mark.parametrize("prefix", ["", "model.head."])
def test_state_dicts_of_old_and_plain_heads_load(prefix):
    plain = nn.Linear(sum(WIDTHS), CLASSES).double()
    holder = make("concat")
    for part in reversed(prefix.split(".")[:-1]):
        holder = nn.ModuleDict({part: holder})
    holder.load_state_dict({prefix + name: t for name, t in plain.state_dict().items()})
    head = holder.get_submodule(prefix[:-1])
    assert torch.equal(head.weight, plain.weight)
    assert torch.equal(head.bias, plain.bias)
    holder.load_state_dict(holder.state_dict())


def test_parameters_of_concat_can_be_set_by_their_names():
    head = make("concat")
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, nn.Parameter(parameter.detach() + 1))
    head.bias = None
    assert list(dict(head.named_parameters())) == ["linear.weight"]
    assert head.weight is head.linear.weight
    assert head(*draw()).fused.shape == (ROWS, CLASSES)


class Acting(Tensor):
    """A tensor that unwraps itself for each operation, and counts them."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner: Tensor):
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        plain = torch.utils._pytree.tree_map(
            lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs or {})
        )
        out = func(*plain[0], **plain[1])
        return cls(out) if func is torch.ops.aten.detach.default else out


@pytest.mark.parametrize("place", ["feature", "weight"])
def test_tensors_that_act_for_themselves_take_plain_pytorch(place, fusion):
    features = [h.detach() for h in draw()]
    head = make(fusion).requires_grad_(False)
    expected = flat(head(*features))
    layer = head._layers()[0]
    if place == "feature":
        features[1] = Acting(features[1])
    else:
        layer.weight = nn.Parameter(Acting(layer.weight.detach()), requires_grad=False)
    Acting.seen.clear()
    found = flat(head(*features))
    assert Acting.seen
    assert not any("dgl_ext" in name for name in Acting.seen)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 1e-12)
    if place == "feature":
        weights = [layer.weight for layer in head._layers()]
        with pytest.raises(ValueError, match='what Acting does: use backend="reference"'):
            functional.fused_decouple(
                features,
                weights[0] if fusion == "concat" else weights,
                fusion=fusion,
                backend="fused",
            )

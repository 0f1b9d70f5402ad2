"""`Decoupled` as other people's fusion modules need it: keyword arguments, masks, one tensor."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from fusion_modules import FLAT, Attention, NormedMLP, grads_of, make, outputs_like, run
from support.problems import assert_same, flat
from support.two_pass import named_logits
from torch import nn

import dgl_ext
from dgl_ext.nn.decoupled import Cat, Decoupled

TOKENS = ((5, 2, 8), (5, 3, 8))


def make_attention(**options):
    torch.manual_seed(0)
    features = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in TOKENS]
    return Decoupled(Attention().double(), **options), features


def with_tokens_removed(fusion, features, kept, cotangent, **kwargs):
    """Row by row, without the absent tokens: what leaving them out means."""
    rows = [
        fusion(*(h[r : r + 1, keep[r]] for h, keep in zip(features, kept, strict=True)), **kwargs)
        for r in range(len(cotangent))
    ]
    z = torch.cat(rows)
    z.backward(cotangent)
    return z, grads_of(fusion, features)


# --- present ---


@pytest.mark.parametrize("given", ["none", "rows", "tokens"])
def test_attention_leaves_out_what_is_absent(given):
    module, features = make_attention()
    every = [torch.ones(h.shape[:2], dtype=torch.bool) for h in features]
    tokens = torch.tensor([[True, False, True]] * 2 + [[True] * 3] * 2 + [[False] * 3])
    rows = torch.arange(5) % 2 == 0
    present = {"none": None, "rows": [rows, None], "tokens": [None, tokens]}[given]
    kept = {"none": every, "rows": [every[0] & rows[:, None], every[1]],
            "tokens": [every[0], tokens]}[given]  # fmt: skip
    fusion, cotangents = copy.deepcopy(module.fusion), outputs_like(module, features)
    out, grads = run(
        module, features, cotangents, call=lambda *h: module(*h, present=present, scale=2.0)
    )
    nothing = [torch.zeros_like(mask) for mask in every]
    passes = [kept, [kept[0], nothing[1]], [nothing[0], kept[1]]]
    expected = [
        with_tokens_removed(fusion, features, masks, cotangent, scale=2.0)
        for masks, cotangent in zip(passes, cotangents, strict=True)
    ]
    values = dgl_ext.DecoupledLogits(expected[0][0], tuple(z for z, _ in expected[1:]))
    truth = {name: expected[0][1][name] for name in grads}
    truth |= {f"features[{i}]": expected[1 + i][1][f"features[{i}]"] for i in range(2)}
    assert_same(named_logits(out), named_logits(values), 1e-12)
    assert_same(grads, truth, 1e-12)
    for h, mask, name in zip(features, kept, ("features[0]", "features[1]"), strict=True):
        assert not grads[name][~mask].any()
        assert h.shape == grads[name].shape


class Asks(nn.Module):
    """Keeps the masks that it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, *features, present):
        self.told.append([mask.clone() for mask in present])
        for mask in present:
            mask.fill_(True)  # its own to write to
        return sum(h.flatten(1).sum(1) for h in features)


@pytest.mark.parametrize(
    ("shape", "masks", "told"),
    [((4, 6), [None], (4,)), ((4, 6), [(4,)], (4,)), ((4, 6), [(4, 6)], (4, 6)),
     ((4, 3, 6), [None], (4, 3)), ((4, 3, 6), [(4,)], (4, 3)), ((4, 3, 6), [(4, 3)], (4, 3)),
     ((4, 2, 3, 6), [(4, 2)], (4, 2, 3))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("substitute", ["zero", "self", lambda features, i: features])
def test_the_masks_that_a_fusion_is_told(shape, masks, told, substitute):
    torch.manual_seed(0)
    features = [torch.randn(shape), torch.randn(shape)]
    mask = None if masks[0] is None else torch.rand(masks[0]) < 0.5
    kept = mask if mask is None else mask.clone()
    module = Decoupled(Asks(), substitute)
    module(*features, present=[mask, None])
    own = torch.ones(told, dtype=torch.bool)
    if mask is not None:
        own &= mask.reshape(mask.shape + (1,) * (len(told) - mask.dim()))
        assert torch.equal(mask, kept)
    other = torch.ones(shape[:-1], dtype=torch.bool)
    expected = [[own, other], [own, ~other], [own & False, other]]
    found = module.fusion.told
    assert len(found) == 3
    for masks_found, truth in zip(found, expected, strict=True):
        assert all(map(torch.equal, masks_found, truth))
        assert all(m.dtype == torch.bool for m in masks_found)


def test_who_asks():
    """By a parameter of that name, however the forward came about."""

    class Takes(nn.Module):
        def forward(self, a, b, **kwargs):
            return a + b + len(kwargs)

    a, b = torch.zeros(2), torch.zeros(2)
    assert Decoupled(Takes())(a, b, other=1).fused.tolist() == [1.0, 1.0]
    assert Decoupled(Takes())(a, b).fused.tolist() == [0.0, 0.0]
    patched, asks = Takes(), Asks()

    @functools.wraps(asks.forward)
    def forward(*args, **kwargs):
        return asks.forward(*args, **kwargs)

    patched.forward = forward
    Decoupled(patched)(torch.zeros(2, 1), torch.zeros(2, 1))
    assert len(asks.told) == 3
    replaced = Decoupled(Takes())
    replaced.fusion = Asks()
    replaced(torch.zeros(2, 1), torch.zeros(2, 1))
    assert len(replaced.fusion.told) == 3


def test_a_head_of_this_package_is_told():
    torch.manual_seed(0)
    head = dgl_ext.nn.ConcatFusion((5, 4), 3, dtype=torch.float64)
    features = [torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (5, 4)]
    present = [torch.arange(6) > 2, None]
    out = Decoupled(head)(*features, present=present)
    alone = head(*features, present=present)
    assert_same({"z": out.unimodal[0].fused}, {"z": alone.unimodal[0]}, 1e-12)
    assert_same({"z": out.fused.fused}, {"z": alone.fused}, 1e-12)


# --- other keyword arguments ---


class Scaled(NormedMLP):
    def forward(self, *features, scale, names=(), flag=None):
        self.seen = (names, flag)
        return super().forward(*features) * scale["a"][0]


@pytest.mark.parametrize("leak", [0.0, 0.5, 1.0])
def test_a_tensor_given_by_keyword_counts_as_a_parameter(leak):
    torch.manual_seed(0)
    module, features = make("batch-norm", head_leak=leak)
    module.fusion = Scaled().double()
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    kwargs = {"scale": {"a": (scale, None)}, "names": ["a"], "flag": 3}
    out = module(*features, **kwargs)
    assert module.fusion.seen == (["a"], 3)
    cotangents = [torch.randn_like(z) for z in flat(out)]
    torch.autograd.backward(flat(out), cotangents)
    # z = y * scale, with y known: z / scale
    parts = [(z * g / scale).sum(0).detach() for z, g in zip(flat(out), cotangents, strict=True)]
    assert_same({"s": scale.grad}, {"s": parts[0] + leak * (parts[1] + parts[2])}, 1e-12)


@pytest.mark.parametrize("leak", [0.0, 0.25])
def test_what_is_given_by_keyword_may_be_written_to(leak):
    class Writes(nn.Module):
        def forward(self, *features, mask, index, extra, items):
            seen.append((mask.tolist(), index.tolist(), extra["e"][0].item(), list(items)))
            mask |= True
            index += 1
            extra["e"][0].mul_(3)
            extra["e"] = None
            items.append(1)
            return sum(features)

    seen, module = [], Decoupled(Writes(), head_leak=leak, encoder_leak=leak)
    mask, index, e, items = torch.zeros(2).bool(), torch.arange(2), torch.ones(1), [0]
    extra = {"e": (e,)}
    module(torch.randn(2), torch.randn(2), mask=mask, index=index, extra=extra, items=items)
    assert seen == [([False, False], [0, 1], 1.0, [0])] * 3
    assert (mask.tolist(), index.tolist(), items, e.item()) == ([False, False], [0, 1], [0], 1.0)
    assert extra["e"][0] is e


def test_an_argument_that_the_fusion_does_not_take():
    module, features = make("concat")
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        module(*features, scale=2)


def test_keywords_and_masks_compile_to_one_graph():
    torch._dynamo.reset()
    module, features = make_attention()
    cotangents = outputs_like(module, features)
    present, scale = [torch.arange(5) > 1, None], torch.tensor(1.5, dtype=torch.float64)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out, grads = run(
            module,
            features,
            cotangents,
            call=lambda *h, call=call: call(*h, present=present, scale=scale),
        )
        results.append({**named_logits(out), **grads})
    assert_same(results[1], results[0], 1e-12)
    torch._dynamo.reset()


# --- Cat ---


def test_cat_is_the_module_of_one_tensor():
    torch.manual_seed(0)
    plain = NormedMLP().double().eval()
    layers = plain.layers
    module = Decoupled(Cat(*layers)).eval()
    assert list(module.fusion.state_dict()) == list(layers.state_dict())
    features = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in FLAT]
    cotangents = outputs_like(module, features)
    out, grads = run(module, features, cotangents)
    expected, expected_grads = run(Decoupled(plain).eval(), features, cotangents)
    assert_same(named_logits(out), named_logits(expected), 0.0)
    assert_same(dict(zip(expected_grads, grads.values(), strict=True)), expected_grads, 0.0)


def test_cat_along_tokens_and_its_repr():
    layer = nn.Linear(8, 3)
    fusion = Cat(layer, dim=1)
    tokens = [torch.randn(s) for s in TOKENS]
    assert torch.equal(fusion(*tokens), layer(torch.cat(tokens, dim=1)))
    assert dgl_ext.nn.Cat is Cat
    assert "dim=1" in repr(fusion)
    assert "dim" not in repr(Cat(layer))

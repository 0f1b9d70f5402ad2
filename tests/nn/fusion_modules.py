"""Fusion modules as people write them, and the recipe that `Decoupled` replaces."""

from __future__ import annotations

import copy

import torch
from support.problems import cotangents_like, flat
from torch import Tensor, nn

import dgl_ext
from dgl_ext.nn.decoupled import Decoupled


class Concat(nn.Module):
    """A linear layer on the concatenation."""

    def __init__(self, widths=(5, 4), classes=3):
        super().__init__()
        self.linear = nn.Linear(sum(widths), classes)

    def forward(self, *features):
        return self.linear(torch.cat(features, dim=-1))


class TokenFusion(nn.Module):
    """Tokens of all modalities, concatenated, through a transformer layer; pooled by mean."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, *tokens):
        return self.out(self.layer(torch.cat(tokens, dim=1)).mean(dim=1))


class Exchange(nn.Module):
    """Two streams that gate each other's channels by their joint squeeze, as MMTM does."""

    def __init__(self, a=4, b=3, joint=5):
        super().__init__()
        self.joint = nn.Linear(a + b, joint)
        self.gate_a, self.gate_b = nn.Linear(joint, a), nn.Linear(joint, b)
        self.conv_a, self.conv_b = nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.out = nn.Linear(a + b, 3)

    def forward(self, a, b):
        squeezed = torch.cat([a.mean((2, 3)), b.mean((2, 3))], dim=1)
        joint = torch.tanh(self.joint(squeezed))
        a = self.conv_a(a * self.gate_a(joint).sigmoid()[:, :, None, None])
        b = self.conv_b(b * self.gate_b(joint).sigmoid()[:, :, None, None])
        return self.out(torch.cat([a.tanh().mean((2, 3)), b.tanh().mean((2, 3))], dim=1))


class NormedMLP(nn.Module):
    """Batch norm and dropout on the way."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3)
        )

    def forward(self, *features):
        return self.layers(torch.cat(features, dim=-1))


class TiedMLP(nn.Module):
    """One matrix under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
        self.second.weight = self.first.weight

    def forward(self, *features):
        return self.second(torch.tanh(self.first(torch.cat(features, dim=-1))))


class TwoNames(nn.Module):
    """Layers as attributes and again in a list, in a list twice, and a matrix of two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)
        self.between = nn.Sequential(nn.Linear(9, 9), nn.Tanh())
        self.between[0].weight = self.first.weight
        body = [self.first, self.norm, *self.between, self.norm]
        self.pipeline = nn.ModuleList([*body, self.between, self.out])

    def forward(self, *features):
        hidden = torch.cat(features, dim=-1)
        for layer in self.pipeline:
            hidden = layer(hidden)
        return hidden


class Recurrent(nn.Module):
    """A GRU over the modalities' tokens: its weights are not only in `_parameters`."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 6, batch_first=True)

    def forward(self, *tokens):
        return self.gru(torch.cat(tokens, dim=1))[0]


class InPlace(nn.Module):
    """Writes to its inputs, in one of the ways that there are, or does the same without that."""

    def __init__(self, way, inplace=True):
        super().__init__()
        self.way, self.inplace = way, inplace
        self.shift, self.out = nn.Parameter(torch.randn(4)), nn.Linear(8, 3)

    def forward(self, *features):
        return self.out(torch.cat([self.changed(x) for x in features], dim=1))

    def changed(self, x):
        if not self.inplace:
            shifted = torch.cat([x[:, :1], x[:, 1:] * 2], dim=1)
            return {"add": x + self.shift, "relu": x.relu(), "view": shifted,
                    "data": torch.full_like(x, 2.0)}[self.way]  # fmt: skip
        if self.way == "add":
            x += self.shift
        elif self.way == "relu":
            x = nn.functional.relu(x, inplace=True)
        elif self.way == "view":
            x[:, 1:].mul_(2)
        else:  # what no version counts
            x.data.fill_(2.0)
        return x


class Attention(nn.Module):
    """One query over all tokens and one token of its own; it leaves out what is absent."""

    def __init__(self):
        super().__init__()
        self.query, self.own = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, *tokens, present=None, scale=1.0):
        query, own = (x.expand(len(tokens[0]), 1, 8) for x in (self.query, self.own))
        absent = None
        if present is not None:
            absent = ~torch.cat([torch.ones_like(own[..., 0], dtype=torch.bool), *present], dim=1)
        joined = torch.cat([own, *tokens], dim=1)
        pooled, _ = self.attention(query, joined, joined, key_padding_mask=absent)
        return self.out(pooled[:, 0] * scale)


class Imputer(nn.Module):
    """Predicts the absent one of two features, and knows too much."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.to_b, self.to_a = nn.Linear(5, 4, dtype=dtype), nn.Linear(4, 5, dtype=dtype)
        self.token = nn.Parameter(torch.randn(6, 4, dtype=dtype))

    def forward(self, features, i):
        a, b = features
        if i == 0:
            return a, self.to_b(a) + b + self.token
        return self.to_a(b) * a, b


FLAT, TOKENS, IMAGES = ((6, 5), (6, 4)), ((6, 2, 8), (6, 3, 8)), ((6, 4, 3, 3), (6, 3, 4, 2))
CASES = {
    "concat": (Concat, FLAT),
    "transformer": (TokenFusion, TOKENS),
    "transformer-dropout": (lambda: TokenFusion(0.3), TOKENS),
    "three-transformer": (TokenFusion, (*TOKENS, (6, 1, 8))),
    "exchange": (Exchange, IMAGES),
    "batch-norm": (NormedMLP, FLAT),
    "batch-norm-dropout": (lambda: NormedMLP(0.4), FLAT),
    "tied": (TiedMLP, FLAT),
    "two-names": (TwoNames, FLAT),
    "recurrent": (Recurrent, TOKENS),
}


def make(case: str, dtype=torch.float64, **options) -> tuple[Decoupled, list[Tensor]]:
    torch.manual_seed(0)
    fusion, shapes = CASES[case]
    module = Decoupled(fusion(), **options).to(dtype)
    features = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return module, features


def substituted(features, i, substitute="zero"):
    if substitute == "self":
        return [features[i]] * len(features)
    return [h if i == j else torch.zeros_like(h) for j, h in enumerate(features)]


def grads_of(module: nn.Module, features) -> dict[str, Tensor | None]:
    named = [(f"features[{i}]", h) for i, h in enumerate(features)] + list(
        module.named_parameters()
    )
    found = {name: tensor.grad for name, tensor in named}
    for _, tensor in named:
        tensor.grad = None
    return found


def recipe(fusion: nn.Module, features, cotangents, substitute="zero", seed=5):
    """Two passes through the plain module: keep the head's gradients, then the encoders'.

    Statistics of the unimodal passes are put back. Returns outputs, gradients, buffers.
    """
    torch.manual_seed(seed)
    before = copy.deepcopy(dict(fusion.named_buffers()))
    outputs = [fusion(*(h.detach() for h in features))]
    after = copy.deepcopy(dict(fusion.named_buffers()))
    outputs[0].backward(cotangents[0])
    head = grads_of(fusion, features)
    for i in range(len(features)):
        for name, buffer in fusion.named_buffers():
            buffer.copy_(before[name])
        outputs.append(fusion(*substituted(features, i, substitute)))
        outputs[-1].backward(cotangents[1 + i])
    for name, buffer in fusion.named_buffers():
        buffer.copy_(after[name])
    encoder = grads_of(fusion, features)
    grads = {name: (encoder if name.startswith("features") else head)[name] for name in head}
    return dgl_ext.DecoupledLogits(outputs[0], tuple(outputs[1:])), grads, after


def run(module: Decoupled, features, cotangents, seed=5, call=None):
    torch.manual_seed(seed)
    out = (module if call is None else call)(*features)
    torch.autograd.backward(flat(out), cotangents)
    return out, grads_of(module.fusion, features)


def outputs_like(module, features):
    """Random cotangents, drawn without touching the module's state."""
    with torch.no_grad():
        return cotangents_like(copy.deepcopy(module)(*features))

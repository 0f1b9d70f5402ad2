"""docs/from-published-code.md: what it says of code that one brings along, beside its blocks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.problems import assert_same, flat
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

import dgl_ext
from dgl_ext.nn.decoupled import Decoupled


def features(*widths):
    return [torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in widths]


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_x, self.fc_y = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x, y):
        return self.fc_x(x) + self.fc_y(y)


class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc_out = nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x, y):
        gamma, beta = self.fc(x).split(4, dim=1)
        return self.fc_out(gamma * y + beta)


@pytest.mark.parametrize(
    ("plain", "head", "names"),
    [
        (Summed, dgl_ext.nn.SumFusion, {"fc_x.": "linears.0.", "fc_y.": "linears.1."}),
        (FiLM, dgl_ext.nn.FiLMFusion, {"fc_out.": "out.", "fc.": "film."}),
    ],
)
def test_checkpoints_of_other_heads_load_renamed(plain, head, names):
    torch.manual_seed(0)
    old, new = plain().double(), head((5, 4), 3, dtype=torch.float64)
    state = old.state_dict()
    for before, after in names.items():
        state = {name.replace(before, after): value for name, value in state.items()}
    new.load_state_dict(state)
    x, y = features(5, 4)
    assert_same({"z": new(x, y).fused}, {"z": old(x, y)}, 1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_unimodal_logits_with_a_share_of_the_bias(count):
    torch.manual_seed(0)
    head = dgl_ext.nn.ConcatFusion((5,) * count, 3, dtype=torch.float64)
    inputs = features(*[5] * count)
    out = head(*inputs)
    by_hand = {
        str(i): h @ head.weight[:, 5 * i : 5 * (i + 1)].t() + head.bias / count
        for i, h in enumerate(inputs)
    }
    ours = {str(i): z - (1 - 1 / count) * head.bias for i, z in enumerate(out.unimodal)}
    assert_same(ours, by_hand, 1e-12)
    assert_same({"sum": sum(by_hand.values())}, {"sum": out.fused}, 1e-12)


def rates(milestones, first: bool) -> list[float]:
    """The learning rate of each epoch, with the schedule at its start or at its end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = MultiStepLR(optimizer, milestones), []
    for _ in range(9):
        if first:
            schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not first:
            schedule.step()
    return found


def test_a_schedule_that_steps_first_is_an_epoch_ahead():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of that order, too
        ahead = rates([4, 7], first=True)
    assert ahead == rates([3, 6], first=False)
    assert ahead[1:] != rates([4, 7], first=False)[1:]


def clipped(alpha: float, apart: bool) -> tuple[float, float]:
    """Norms of the gradients of head and encoders, after clipping."""
    torch.manual_seed(0)
    encoders = nn.ModuleList([nn.Linear(7, 5), nn.Linear(7, 4)]).double()
    head = dgl_ext.nn.ConcatFusion((5, 4), 3, dtype=torch.float64)
    x, target = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    logits = head(*(encoder(x) for encoder in encoders))
    logits.loss(F.cross_entropy, target, alpha=alpha)[0].backward()
    parts = [list(head.parameters()), list(encoders.parameters())]
    for parameters in parts if apart else [parts[0] + parts[1]]:
        nn.utils.clip_grad_norm_(parameters, 0.02)
    norms = [torch.cat([p.grad.flatten() for p in part]).norm().item() for part in parts]
    return norms[0], norms[1]


def test_alpha_lowers_the_head_s_rate_once_gradients_are_clipped():
    (head, encoders), (head_10, encoders_10) = clipped(1.0, False), clipped(10.0, False)
    assert head_10 < 0.5 * head
    assert encoders <= encoders_10 < 2 * encoders
    assert clipped(1.0, True)[0] == pytest.approx(clipped(10.0, True)[0], rel=1e-12)


def test_gradients_that_are_none():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "audio": nn.Linear(7, 5),
            "video": nn.Linear(7, 4),
            "head": dgl_ext.nn.ConcatFusion((5, 4), 3),
        }
    )
    model["audio"].bias.requires_grad_(False)
    x, target = torch.randn(6, 7), torch.tensor([0, 2, 1, 1, 0, 2])
    logits = model["head"](model["audio"](x), model["video"](x))
    F.cross_entropy(logits.unimodal[0], target).backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert reached == ["audio.weight"]


class Gate(nn.Module):
    """The published gated head in our words; the call leaves its first layers out."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 4)])
        self.out = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.out(torch.sigmoid(x) * y)


def test_the_published_gated_head_is_one_with_frozen_layers_outside():
    torch.manual_seed(0)
    fusion = Gate().double()
    inputs = features(5, 4)
    cotangents = [torch.randn(6, 3, dtype=torch.float64) for _ in range(3)]
    # As published: cut after the first layers, and whatever reached the head cleared in between.
    x, y = (layer(h) for layer, h in zip(fusion.hidden, inputs, strict=True))
    torch.autograd.backward([fusion(x, x), fusion(y, y)], cotangents[1:], retain_graph=True)
    fusion.zero_grad()
    fusion(x.detach(), y.detach()).backward(cotangents[0])
    named = {**dict(enumerate(inputs)), **dict(fusion.named_parameters())}
    expected = {str(name): tensor.grad for name, tensor in named.items()}
    for tensor in named.values():
        tensor.grad = None
    fusion.hidden.requires_grad_(False)
    hidden = [layer(h) for layer, h in zip(fusion.hidden, inputs, strict=True)]
    torch.autograd.backward(flat(Decoupled(fusion, "self")(*hidden)), cotangents)
    assert_same({str(name): tensor.grad for name, tensor in named.items()}, expected, 1e-12)
    assert expected["hidden.0.weight"] is None

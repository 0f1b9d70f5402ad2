"""Plain calls are checked by the ops alone; all others, and those that fail, from Python too."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.problems import make_problem
from torch import Tensor

import dgl_ext
from dgl_ext._arguments.heads import HEADS, Head
from dgl_ext._ops import extension as _extension

ROWS = 4
MASK = torch.tensor([True, False, True, True])

pytestmark = pytest.mark.skipif(not _extension.available(), reason="needs the C++ extension")


class Subclass(Tensor):
    """Like a tensor, but who knows."""


class Sequence:
    """Neither a list nor a tuple, as `nn.ParameterList`."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """The heads whose arguments Python looked at."""
    names: list[str] = []
    check = Head.check

    def record(self, *arguments):
        names.append(self.name)
        return check(self, *arguments)

    monkeypatch.setattr(Head, "check", record)
    return names


def call(fusion: str, change=tuple, **options) -> tuple[Tensor, ...]:
    """Calls both functions, with `change` applied to the features; returns losses and gradients."""
    problem = make_problem(fusion, leading=(ROWS,), dtype=torch.float32)
    features, weight, bias = change(problem.features), problem.weight, problem.bias
    target = torch.arange(ROWS) % 3
    logits = dgl_ext.fused_decouple(features, weight, bias, fusion=fusion, **options)
    loss = dgl_ext.fused_decouple_cross_entropy(
        features, weight, target, bias=bias, fusion=fusion, **options
    )
    (loss.total + logits.fused.float().square().sum()).backward()
    return loss.total.detach(), logits.fused.detach(), problem.features[0].grad


@pytest.mark.parametrize("present", [None, (None, MASK)], ids=["everywhere", "masked"])
@pytest.mark.parametrize("fusion", HEADS)
def test_a_plain_call_is_left_to_the_ops(fusion, present, looked):
    call(fusion, present=present)
    assert looked == []


@pytest.mark.parametrize("fusion", HEADS)
def test_what_python_looks_at_computes_the_same(fusion, looked):
    plain = call(fusion)
    checked = call(fusion, backend="fused")
    assert looked == [fusion] * 2
    for ours, theirs in zip(plain, checked, strict=True):
        assert torch.equal(ours, theirs)


OTHERS = {
    "another sequence": {"change": Sequence},
    "a subclass": {"change": lambda features: [h.as_subclass(Subclass) for h in features]},
    "an empty present": {"present": ()},
    "a backend": {"backend": "fused"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("fusion", HEADS)
def test_any_other_call_is_checked(fusion, name, looked):
    with contextlib.suppress(ValueError):  # as the empty `present` gets
        call(fusion, **OTHERS[name])
    assert looked


@pytest.mark.parametrize("fusion", HEADS)
def test_autocast_is_not_plain(fusion, looked):
    with torch.autocast("cpu", torch.bfloat16):
        _, logits, _ = call(fusion)
    assert looked == [fusion] * 2
    assert logits.dtype == torch.bfloat16


def test_true_is_no_number_though_it_equals_one():
    """The plan of a step is remembered by its numbers, and `1 == True`."""
    problem = make_problem("concat", leading=(ROWS,), dtype=torch.float32)
    arguments = problem.features, problem.weight, torch.zeros(ROWS, dtype=torch.int64)
    for good, bad in ((1, True), ((1, 1), (True, True))):
        dgl_ext.fused_decouple_cross_entropy(*arguments, alpha=good)
        with pytest.raises(TypeError, match="alpha"):
            dgl_ext.fused_decouple_cross_entropy(*arguments, alpha=bad)


def test_one_weight_for_two_modalities_is_not_concat():
    """The op could not tell: concat and sum share it."""
    x, y = torch.rand(ROWS, 5), torch.rand(ROWS, 4)
    with pytest.raises(ValueError, match="weight: expected 2 tensors"):
        dgl_ext.fused_decouple([x, y], [torch.rand(3, 9)], [torch.rand(3)], fusion="sum")


@pytest.mark.parametrize("alone", ["features", "weight", "target"])
def test_a_meta_tensor_among_others_is_an_error(alone):
    """The dispatcher then takes the fake kernel, which computes nothing."""
    arguments = {
        "features": [torch.rand(ROWS, 5), torch.rand(ROWS, 4)],
        "weight": torch.rand(3, 9),
        "target": torch.zeros(ROWS, dtype=torch.int64),
    }
    value = arguments[alone]
    if alone == "features":
        arguments["features"] = [value[0], value[1].to("meta")]
    else:
        arguments[alone] = value.to("meta")
    with pytest.raises(ValueError, match="expected device cpu"):
        dgl_ext.fused_decouple_cross_entropy(**arguments)

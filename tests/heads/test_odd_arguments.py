"""Containers, tensors and numbers that nearly fit: both functions say what is wrong."""

from __future__ import annotations

import pytest
import torch
from support.problems import make_problem
from torch.masked import masked_tensor

import dgl_ext

ROWS = 3
PROBLEM = make_problem("sum", leading=(ROWS,), classes=4, dtype=torch.float32, requires_grad=False)
X, Y = PROBLEM.features
MASK = torch.tensor([True, False, True])
TARGET = torch.tensor([0, 3, 1])
DENSE = "expected a dense (torch.strided) tensor, got"
HUGE = 7**600  # no float64


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(1, 5)])


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(1, 5)], layout=torch.jagged)


def masked() -> torch.Tensor:
    return masked_tensor(X, torch.rand(X.shape) < 0.5)


def uninitialized() -> torch.Tensor:
    return torch.nn.LazyLinear(4).weight


# what is changed, the error's type, the message
TENSORS = {
    "a dict of features": (
        {"features": {0: X, 1: Y}},
        TypeError,
        "features: expected a sequence of tensors, one per modality, got dict",
    ),
    "a parameter dict": (
        {"weight": torch.nn.ParameterDict({"0": PROBLEM.weights[0]})},
        TypeError,
        'weight: expected a sequence of 2 tensors for fusion="sum", got ParameterDict',
    ),
    "a dict of masks": (
        {"present": {0: None, 1: MASK}},
        TypeError,
        "present: expected a sequence of bool tensors, one per modality, got dict",
    ),
    "a nested feature": (
        {"features": [X, nested()]},
        TypeError,
        f"features[1]: {DENSE} a nested tensor",
    ),
    "jagged features": (
        {"features": [jagged(), jagged()]},
        TypeError,
        f"features[0]: {DENSE} a nested tensor",
    ),
    "a masked feature": (
        {"features": [masked(), Y]},
        TypeError,
        f"features[0]: {DENSE} a MaskedTensor (`present` takes masks of rows)",
    ),
    "a masked weight": (
        {"weight": [masked(), PROBLEM.weights[1]]},
        TypeError,
        f"weight[0]: {DENSE} a MaskedTensor (`present` takes masks of rows)",
    ),
    "a sparse mask": (
        {"present": [None, MASK.to_sparse()]},
        TypeError,
        f"present[1]: {DENSE} torch.sparse_coo",
    ),
    "a weight without a shape": (
        {"weight": [uninitialized(), PROBLEM.weights[1]]},
        ValueError,
        "weight[0]: expected a tensor with a shape, got an UninitializedParameter: "
        "call its lazy module once before",
    ),
    "an int of any size for a leak": (
        {"head_leak": HUGE},
        ValueError,
        "head_leak: expected a number in [0, 1], got an int of 1685 bits",
    ),
}
STEPS = {
    **TENSORS,
    "a sparse target": (
        {"target": TARGET.to_sparse()},
        TypeError,
        f"target: {DENSE} torch.sparse_coo",
    ),
    "a dict for alpha": (
        {"alpha": {0: 1.0, 1: 2.0}},
        TypeError,
        "alpha: expected a number, or a sequence of one per modality, got dict",
    ),
    "an int of any size for alpha": (
        {"alpha": [1, -HUGE]},
        ValueError,
        "alpha[1]: expected a finite number, got an int of 1685 bits",
    ),
    "an int of any size for smoothing": (
        {"label_smoothing": 10**5000},
        ValueError,
        "label_smoothing: expected a number in [0, 1], got an int of 16610 bits",
    ),
    "an int of any size to ignore": (
        {"ignore_index": HUGE},
        ValueError,
        "ignore_index: expected an int of 64 bits, got an int of 1685 bits",
    ),
    "a list for reduction": (
        {"reduction": ["mean"]},
        ValueError,
        'reduction: expected one of "mean", "sum", got [\'mean\']',
    ),
}
PLAIN = {"features": PROBLEM.features, "weight": PROBLEM.weights, "fusion": "sum"}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TENSORS)
def test_logits(name, backend):
    changes, error, message = TENSORS[name]
    with pytest.raises(error) as raised:
        dgl_ext.fused_decouple(**{**PLAIN, **changes}, backend=backend)
    assert str(raised.value) == message


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step(name, backend):
    changes, error, message = STEPS[name]
    with pytest.raises(error) as raised:
        dgl_ext.fused_decouple_cross_entropy(
            **{**PLAIN, "target": TARGET, **changes}, backend=backend
        )
    assert str(raised.value) == message


def test_a_backend_that_is_no_string():
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got \['auto'\]"):
        dgl_ext.fused_decouple(**PLAIN, backend=["auto"])

"""Bad input to the training step: an error that names argument, expectation and value."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import BACKENDS, make_problem, make_target

import dgl_ext
from dgl_ext.types import DecoupledLoss

ROWS, CLASSES = 4, 3
TARGET = torch.tensor([0, 2, 1, 0])
MASK = torch.ones(ROWS, dtype=torch.bool)


def call(function=None, fusion="concat", target=TARGET, **options) -> DecoupledLoss:
    problem = make_problem(fusion, leading=(ROWS,), classes=CLASSES, dtype=torch.float32)
    function = function or dgl_ext.fused_decouple_cross_entropy
    return problem.step(function, target, **options)


# name: (arguments, type of error, its message)
CASES = {
    "target a list": (
        {"target": [0, 1, 2, 0]},
        TypeError,
        "target: expected a tensor of classes or probabilities, got list",
    ),
    "target bool": (
        {"target": TARGET.bool()},
        TypeError,
        "target: expected integer class indices, torch.int64 at most, or floating probabilities, "
        "got torch.bool",
    ),
    "soft target of another shape": (
        {"target": torch.rand(ROWS, CLASSES + 1)},
        ValueError,
        "target: expected shape (4, 3), got (4, 4)",
    ),
    "soft target without classes": (
        {"target": torch.rand(ROWS)},
        ValueError,
        "target: expected shape (4, 3), got (4,)",
    ),
    "soft target with gradient": (
        {"target": torch.rand(ROWS, CLASSES).requires_grad_()},
        ValueError,
        "target: expected a tensor without gradient, since none is computed for it: detach() it",
    ),
    "class_weight a list": (
        {"class_weight": [1.0, 2.0, 3.0]},
        TypeError,
        "class_weight: expected a tensor or None, got list",
    ),
    "class_weight of another shape": (
        {"class_weight": torch.ones(CLASSES + 1)},
        ValueError,
        "class_weight: expected shape (3,), got (4,)",
    ),
    "class_weight complex": (
        {"class_weight": torch.ones(CLASSES, dtype=torch.complex64)},
        TypeError,
        "class_weight: expected real numbers, got torch.complex64",
    ),
    "sample_weight of another shape": (
        {"sample_weight": torch.ones(ROWS, 1)},
        ValueError,
        "sample_weight: expected shape (4,), the features' leading shape, got (4, 1)",
    ),
    "sample_weight on another device": (
        {"sample_weight": torch.ones(ROWS, device="meta")},
        ValueError,
        "sample_weight: expected device cpu as features[0], got meta",
    ),
    "sample_weight with gradient": (
        {"sample_weight": torch.ones(ROWS).requires_grad_()},
        ValueError,
        "sample_weight: expected a tensor without gradient, since none is computed for it: "
        "detach() it",
    ),
    "unknown mode": (
        {"mode": "both"},
        ValueError,
        'mode: expected one of "dgl", "joint", "joint+unimodal", got \'both\'',
    ),
    "target of another shape": (
        {"target": TARGET[:3]},
        ValueError,
        "target: expected shape (4,), the features' leading shape, got (3,)",
    ),
    "target on another device": (
        {"target": TARGET.to("meta")},
        ValueError,
        "target: expected device cpu as features[0], got meta",
    ),
    "alpha a string": (
        {"alpha": "1"},
        TypeError,
        "alpha: expected a number, or a sequence of one per modality, got str",
    ),
    "alpha a bool": (
        {"alpha": True},
        TypeError,
        "alpha: expected a number, or a sequence of one per modality, got bool",
    ),
    "alpha too short": (
        {"alpha": (1.0,)},
        ValueError,
        "alpha: expected 2 numbers, one per modality, got 1",
    ),
    "alpha of tensors": (
        {"alpha": [torch.tensor([1.0, 2.0]), 1.0]},
        TypeError,
        "alpha[0]: expected a number, got Tensor",
    ),
    "alpha NaN": (
        {"alpha": [1.0, float("nan")]},
        ValueError,
        "alpha[1]: expected a finite number, got nan",
    ),
    "alpha infinite": (
        {"alpha": float("inf")},
        ValueError,
        "alpha: expected a finite number, got inf",
    ),
    "reduction none": (
        {"reduction": "none"},
        ValueError,
        'reduction: expected one of "mean", "sum", got \'none\'',
    ),
    "ignore_index a float": (
        {"ignore_index": -100.0},
        TypeError,
        "ignore_index: expected an int, got float",
    ),
    "label_smoothing above 1": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing: expected a number in [0, 1], got 1.5",
    ),
    "present too short": (
        {"present": [MASK]},
        ValueError,
        "present: expected 2 entries, one per modality, got 1",
    ),
    "leak negative": (
        {"head_leak": -0.1},
        ValueError,
        "head_leak: expected a number in [0, 1], got -0.1",
    ),
    "unknown fusion": (
        {"function": lambda *args, **options: dgl_ext.fused_decouple_cross_entropy(
            *args, **{**options, "fusion": "add"}
        )},
        ValueError,
        'fusion: expected one of "concat", "sum", "film", got \'add\'',
    ),
    "unknown backend": (
        {"backend": "gpu"},
        ValueError,
        'backend: expected one of "auto", "fused", "library", "reference", got \'gpu\'',
    ),
    "a backend's former name": (
        {"backend": "composed"},
        ValueError,
        'backend: "composed" is now called "library"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    arguments, error, message = CASES[name]
    with pytest.raises(error) as raised:
        call(**arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", [name for name in CASES if "backend" not in CASES[name][0]])
def test_the_reference_checks_the_same(name):
    arguments, error, message = CASES[name]
    with pytest.raises(error) as raised:
        call(**arguments, backend="reference")
    assert str(raised.value) == message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [CLASSES, -1, -101, 2**40])
def test_a_target_out_of_range(fusion, backend, value):
    target = TARGET.clone()
    target[2] = value
    error = IndexError if backend == "reference" else (RuntimeError, IndexError)
    with pytest.raises(error, match=rf"{value}"):
        call(fusion=fusion, target=target, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["class_weight", "sample_weight"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_no_weight(fusion, backend, name, value):
    weight = torch.ones(CLASSES if name == "class_weight" else ROWS)
    weight[1] = value
    with pytest.raises(
        RuntimeError, match=f"{name}: expected finite weights, 0 or more, got {value}"
    ):
        call(fusion=fusion, backend=backend, **{name: weight})


def test_a_target_out_of_range_is_named(fusion):
    target = torch.tensor([0, 1, 7, 2])
    with pytest.raises(RuntimeError, match=r"target: expected .*\[0, 3\).*, got 7"):
        call(fusion=fusion, target=target, backend="fused")


def test_an_ignored_target_may_be_any_number(fusion):
    for index in (-1, 7, 2**40, -(2**40)):
        target = torch.tensor([0, index, 1, index])
        loss = call(fusion=fusion, target=target, ignore_index=index, backend="fused")
        assert loss.total.isfinite()


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "limit: expected a positive number of bytes, got 0"),
        (1.5, TypeError, "limit: expected an int or None, got float"),
        (True, TypeError, "limit: expected an int or None, got bool"),
        (2**63, ValueError, f"limit: expected at most 2**63 - 1 bytes, got {2**63}"),
        (2**90, ValueError, f"limit: expected at most 2**63 - 1 bytes, got {2**90}"),
    ],
)
def test_the_workspace_limit_is_checked(limit, error, message):
    before = dgl_ext.workspace_limit()
    with pytest.raises(error) as raised:
        dgl_ext.set_workspace_limit(limit)
    assert str(raised.value) == message
    assert dgl_ext.workspace_limit() is before is None


def test_setting_the_workspace_limit_returns_the_one_before(workspace_limit):
    workspace_limit(1000)
    assert dgl_ext.set_workspace_limit(2000) == 1000
    assert dgl_ext.workspace_limit() == 2000


def raw_arguments(fusion: str = "concat") -> dict:
    problem = make_problem(
        fusion, leading=(ROWS,), classes=CLASSES, dtype=torch.float32, requires_grad=False
    )
    count = len(problem.weights)
    return {
        "features": list(problem.features),
        "weights": list(problem.weights),
        "biases": list(problem.biases),
        "target": make_target(problem),
        "class_weight": None,
        "sample_weight": None,
        "present": [],
        "alpha": [1.0, 1.0],
        "mean": True,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "needs_features": [True, True],
        "needs_weights": [True] * count,
        "needs_biases": [True] * count,
        "encoder_leak": 0.0,
        "head_leak": 0.0,
        "workspace_limit": 2**20,
    }


RAW_CASES = {
    "target dtype": ({"target": TARGET.int()}, "target: expected int64"),
    "target shape": ({"target": TARGET[:2]}, "target: expected shape (4,), got (2,)"),
    "soft target": ({"target": torch.rand(4, 2)}, "target: expected shape (4, 3), got (4, 2)"),
    "class weight dtype": (
        {"class_weight": torch.ones(3, dtype=torch.float64)},
        "class_weight: expected float32, got float64",
    ),
    "class weight shape": (
        {"class_weight": torch.ones(2)},
        "class_weight: expected shape (3,), got (2,)",
    ),
    "sample weight shape": (
        {"sample_weight": torch.ones(2)},
        "sample_weight: expected shape (4,), got (2,)",
    ),
    "present count": ({"present": [None]}, "present: expected 2 entries, got 1"),
    "present dtype": ({"present": [TARGET, None]}, "present[0]: expected bool"),
    "present shape": ({"present": [None, MASK[:3]]}, "present[1]: expected shape (4,), got (3,)"),
    "alpha count": ({"alpha": [1.0]}, "alpha: expected 2 entries, got 1"),
    "needs count": ({"needs_features": [True]}, "needs_features: expected 2 entries, got 1"),
    "smoothing": ({"label_smoothing": 1.5}, "label_smoothing: expected a number in [0, 1], got"),
    "alpha": ({"alpha": [1.0, math.inf]}, "alpha[1]: expected a finite number, got inf"),
    "leak": ({"encoder_leak": math.nan}, "encoder_leak: expected a number in [0, 1], got nan"),
    "head leak": ({"head_leak": -0.5}, "head_leak: expected a number in [0, 1], got -0.5"),
    "limit": ({"workspace_limit": -1}, "workspace_limit: expected a number of bytes, or 0, got -1"),
}


@pytest.mark.parametrize("name", RAW_CASES)
def test_raw_ops_check_too(fusion, name):
    changes, message = RAW_CASES[name]
    op = "film_head_step" if fusion == "film" else "linear_head_step"
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.dgl_ext, op).default(**{**raw_arguments(fusion), **changes})
    assert f"dgl_ext::{op}: {message}" in str(raised.value)


def test_a_raw_step_refuses_to_lose_a_gradient(fusion):
    arguments = raw_arguments(fusion)
    arguments["weights"][0].requires_grad_()
    op = "film_head_step" if fusion == "film" else "linear_head_step"
    with pytest.raises(RuntimeError, match="not differentiable on its own"):
        getattr(torch.ops.dgl_ext, op).default(**arguments)

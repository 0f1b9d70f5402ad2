"""Bad input: an error that names argument, expectation and value; at once, and nothing changed."""

from __future__ import annotations

import time

import pytest
import torch
from support.problems import make_problem

import dgl_ext
from dgl_ext._ops import extension as _extension

ROWS, WIDTHS, CLASSES = 4, (5, 4), 3


def rand(*shape: int, **options) -> torch.Tensor:
    return torch.rand(shape, **options)


def concat(**changes) -> dict:
    arguments = {
        "features": [rand(ROWS, 5), rand(ROWS, 4)],
        "weight": rand(CLASSES, 9),
        "bias": rand(CLASSES),
    }
    return {**arguments, **changes}


def summed(**changes) -> dict:
    return concat(
        **{
            "weight": [rand(CLASSES, 5), rand(CLASSES, 4)],
            "bias": [rand(CLASSES), rand(CLASSES)],
            "fusion": "sum",
            **changes,
        }
    )


def film(**changes) -> dict:
    return concat(
        **{
            "weight": [rand(8, 5), rand(CLASSES, 4)],
            "bias": [rand(8), rand(CLASSES)],
            "fusion": "film",
            **changes,
        }
    )


X, Y = rand(ROWS, 5), rand(ROWS, 4)
MASK = torch.ones(ROWS, dtype=torch.bool)

# name: (arguments, type of error, its message from the start)
CASES = {
    "features a tensor": (
        concat(features=X),
        TypeError,
        "features: expected a sequence of tensors, one per modality, got Tensor",
    ),
    "features none": (
        concat(features=[]),
        ValueError,
        "features: expected at least one tensor, got none",
    ),
    "feature not a tensor": (
        concat(features=[X, [1.0]]),
        TypeError,
        "features[1]: expected a torch.Tensor, got list",
    ),
    "features of integers": (
        concat(features=[X, Y.long()]),
        TypeError,
        "features[1]: expected one of torch.float64, torch.float32, torch.bfloat16, "
        "torch.float16, got torch.int64",
    ),
    "features complex": (
        concat(features=[X.to(torch.complex64), Y]),
        TypeError,
        "features[0]: expected one of torch.float64, torch.float32, torch.bfloat16, "
        "torch.float16, got torch.complex64",
    ),
    "feature sparse": (
        concat(features=[X, Y.to_sparse()]),
        TypeError,
        "features[1]: expected a dense (torch.strided) tensor, got torch.sparse_coo",
    ),
    "feature a scalar": (
        concat(features=[rand(), Y]),
        ValueError,
        "features[0]: expected shape (..., D), got a scalar",
    ),
    "leading shapes differ": (
        concat(features=[X, rand(3, 4)]),
        ValueError,
        "features[1]: expected leading shape (4,) as features[0], got (3,)",
    ),
    "feature dtypes differ": (
        concat(features=[X, Y.double()]),
        TypeError,
        "features[1]: expected torch.float32 as features[0], got torch.float64",
    ),
    "feature devices differ": (
        concat(features=[X, Y.to("meta")]),
        ValueError,
        "features[1]: expected device cpu as features[0], got meta",
    ),
    "nine modalities": (
        concat(features=[X] * 9),
        ValueError,
        'features: expected 1 to 8 tensors for fusion="concat", got 9',
    ),
    "film of three": (
        film(features=[X, Y, Y]),
        ValueError,
        'features: expected 2 tensors for fusion="film", got 3',
    ),
    "weight of another width": (
        concat(weight=rand(CLASSES, 10)),
        ValueError,
        "weight: expected shape (C, 9), got (3, 10)",
    ),
    "weight transposed": (
        concat(weight=rand(9, CLASSES)),
        ValueError,
        "weight: expected shape (C, 9), got (9, 3)",
    ),
    "weight of one dimension": (
        concat(weight=rand(9)),
        ValueError,
        "weight: expected shape (C, 9), got (9,)",
    ),
    "weight none": (
        concat(weight=None),
        TypeError,
        "weight: expected a torch.Tensor, got NoneType",
    ),
    "weight a list for concat": (
        concat(weight=[rand(CLASSES, 5), rand(CLASSES, 4)]),
        TypeError,
        "weight: expected a torch.Tensor, got list",
    ),
    "weight a tensor for sum": (
        summed(weight=rand(CLASSES, 9)),
        TypeError,
        'weight: expected a sequence of 2 tensors for fusion="sum", got Tensor',
    ),
    "weight of another dtype": (
        concat(weight=rand(CLASSES, 9).double()),
        TypeError,
        "weight: expected torch.float32 as features[0], got torch.float64",
    ),
    "weight on another device": (
        concat(weight=rand(CLASSES, 9, device="meta")),
        ValueError,
        "weight: expected device cpu as features[0], got meta",
    ),
    "wrong number of weights": (
        summed(weight=[rand(CLASSES, 5)]),
        ValueError,
        'weight: expected 2 tensors for fusion="sum", got 1',
    ),
    "second weight of another C": (
        summed(weight=[rand(CLASSES, 5), rand(2, 4)]),
        ValueError,
        "weight[1]: expected shape (3, 4), got (2, 4)",
    ),
    "film weight of another H": (
        film(weight=[rand(4, 5), rand(CLASSES, 4)]),
        ValueError,
        "weight[0]: expected shape (8, 5), got (4, 5)",
    ),
    "out weight of another H": (
        film(weight=[rand(8, 5), rand(CLASSES, 8)]),
        ValueError,
        "weight[1]: expected shape (C, 4), got (3, 8)",
    ),
    "bias of another C": (
        concat(bias=rand(2)),
        ValueError,
        "bias: expected shape (3,), got (2,)",
    ),
    "bias a number": (
        concat(bias=0.0),
        TypeError,
        "bias: expected a torch.Tensor, got float",
    ),
    "bias of another dtype": (
        summed(bias=[None, rand(CLASSES).half()]),
        TypeError,
        "bias[1]: expected torch.float32 as features[0], got torch.float16",
    ),
    "wrong number of biases": (
        film(bias=[rand(8)]),
        ValueError,
        'bias: expected 2 tensors for fusion="film", got 1',
    ),
    "unknown fusion": (
        concat(fusion="add"),
        ValueError,
        'fusion: expected one of "concat", "sum", "film", got \'add\'',
    ),
    "fusion none": (
        concat(fusion=None),
        ValueError,
        'fusion: expected one of "concat", "sum", "film", got None',
    ),
    "leak NaN": (
        concat(encoder_leak=float("nan")),
        ValueError,
        "encoder_leak: expected a number in [0, 1], got nan",
    ),
    "leak negative": (
        concat(head_leak=-0.1),
        ValueError,
        "head_leak: expected a number in [0, 1], got -0.1",
    ),
    "leak a tensor": (
        concat(head_leak=torch.tensor([0.5, 0.5])),
        TypeError,
        "head_leak: expected a number in [0, 1], got Tensor",
    ),
    "leak a bool": (
        concat(encoder_leak=True),
        TypeError,
        "encoder_leak: expected a number in [0, 1], got bool",
    ),
    "present a tensor": (
        concat(present=MASK),
        TypeError,
        "present: expected a sequence of bool tensors, one per modality, got Tensor",
    ),
    "present too short": (
        concat(present=[MASK]),
        ValueError,
        "present: expected 2 entries, one per modality, got 1",
    ),
    "present of floats": (
        concat(present=[MASK.float(), None]),
        TypeError,
        "present[0]: expected torch.bool, got torch.float32",
    ),
    "present not a tensor": (
        concat(present=[None, [True]]),
        TypeError,
        "present[1]: expected a bool tensor or None, got list",
    ),
    "present of another shape": (
        concat(present=[None, MASK[:2]]),
        ValueError,
        "present[1]: expected shape (4,), the features' leading shape, got (2,)",
    ),
    "present on another device": (
        concat(present=[None, MASK.to("meta")]),
        ValueError,
        "present[1]: expected device cpu, got meta",
    ),
    "unknown backend": (
        concat(backend="gpu"),
        ValueError,
        'backend: expected one of "auto", "fused", "library", "reference", got \'gpu\'',
    ),
    **{
        f"former name {former}": (
            concat(backend=former),
            ValueError,
            f'backend: "{former}" is now called "{name}"',
        )
        for former, name in (("cpu", "fused"), ("cuda", "fused"), ("composed", "library"))
    },
    "fused backend on another device": (
        {
            name: [t.to("meta") for t in value] if name == "features" else value.to("meta")
            for name, value in concat().items()
        }
        | {"backend": "fused"},
        ValueError,
        'backend: "fused" needs features on a CPU or CUDA, got meta',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    arguments, error, message = CASES[name]
    with pytest.raises(error) as raised:
        dgl_ext.fused_decouple(**arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "backend" not in case[0]])
def test_the_reference_checks_the_same(name):
    arguments, error, message = CASES[name]
    with pytest.raises(error) as raised:
        dgl_ext.fused_decouple(**arguments, backend="reference")
    assert str(raised.value) == message


@pytest.mark.parametrize("name", CASES)
def test_an_error_takes_less_than_a_millisecond(name):
    """The quickest of a few: this machine may be busy."""
    arguments, error, _ = CASES[name]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        with pytest.raises(error):
            dgl_ext.fused_decouple(**arguments)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_an_error_leaves_the_arguments_as_they_were():
    arguments = concat(bias=rand(2))
    tensors = [*arguments["features"], arguments["weight"], arguments["bias"]]
    before = [(t.clone(), t._version, t.requires_grad) for t in tensors]
    with pytest.raises(ValueError, match="bias"):
        dgl_ext.fused_decouple(**arguments)
    for tensor, (value, version, requires_grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert (tensor._version, tensor.requires_grad) == (version, requires_grad)


def test_a_backend_that_did_not_load_raises_the_real_error(monkeypatch):
    cause = ImportError("libtorch_cpu.so: not there")
    monkeypatch.setattr(_extension, "_errors", {"cpu": cause, "cuda": cause})
    with pytest.raises(RuntimeError, match=r"not loaded: libtorch_cpu\.so: not there") as raised:
        dgl_ext.fused_decouple(**concat(backend="fused"))
    assert raised.value.__cause__ is cause
    with pytest.warns(RuntimeWarning, match=r"runs its slower reference: libtorch_cpu\.so"):
        logits = dgl_ext.fused_decouple(**concat())
    assert logits.fused.shape == (ROWS, CLASSES)


F64 = rand(ROWS, 4, dtype=torch.float64)

# name: (op, arguments, message), for those who call an op themselves
RAW_CASES = {
    "no features": ("linear_head", ([], [rand(3, 9)], [None]), "features: expected 1 to 8 tensors"),
    "nine features": (
        "linear_head",
        ([X] * 9, [rand(3, 45)], [None]),
        "features: expected 1 to 8 tensors, got 9",
    ),
    "integers": (
        "linear_head",
        ([X.long()], [rand(3, 5)], [None]),
        "features[0]: expected float64, float32, bfloat16 or float16, got int64",
    ),
    "dtype mix": (
        "linear_head",
        ([X, F64], [rand(3, 9)], [None]),
        "features[1]: expected float32 as features[0], got float64",
    ),
    "leading shapes": (
        "linear_head",
        ([X, rand(3, 4)], [rand(3, 9)], [None]),
        "features[1]: expected leading shape (4,) as features[0], got (3,)",
    ),
    "scalar": (
        "linear_head",
        ([rand()], [rand(3, 5)], [None]),
        "features[0]: expected shape (..., D), got a scalar",
    ),
    "weight width": (
        "linear_head",
        ([X, Y], [rand(3, 8)], [None]),
        "weights[0]: expected shape (3, 9), got (3, 8)",
    ),
    "weight rank": (
        "linear_head",
        ([X, Y], [rand(9)], [None]),
        "weights[0]: expected shape (C, D), got (9,)",
    ),
    "no weights": (
        "linear_head",
        ([X, Y], [], []),
        "weights: expected 2 entries, got 0",
    ),
    "weight count": (
        "linear_head",
        ([X, Y, Y], [rand(3, 5), rand(3, 4)], [None, None]),
        "weights: expected 3 entries, got 2",
    ),
    "bias count": (
        "linear_head",
        ([X, Y], [rand(3, 9)], [None, None]),
        "biases: expected 1 entries, got 2",
    ),
    "bias shape": (
        "linear_head",
        ([X, Y], [rand(3, 9)], [rand(4)]),
        "biases[0]: expected shape (3,), got (4,)",
    ),
    "film weights": (
        "film_head",
        ([X, Y], [rand(3, 4)], [None]),
        "weights: expected 2 entries, got 1",
    ),
    "film shape": (
        "film_head",
        ([X, Y], [rand(8, 4), rand(3, 4)], [None, None]),
        "weights[0]: expected shape (8, 5), got (8, 4)",
    ),
    "film rank": (
        "film_head",
        ([X, Y], [rand(8, 5), rand(4)], [None, None]),
        "weights[1]: expected shape (C, H), got (4,)",
    ),
}


@pytest.mark.parametrize("name", RAW_CASES)
def test_raw_ops_check_too(name):
    head, arguments, message = RAW_CASES[name]
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.dgl_ext, f"{head}_forward").default(*arguments, [])
    assert f"dgl_ext::{head}_forward: {message}" in str(raised.value)


def test_raw_ops_have_no_kernel_for_sparse_tensors():
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        torch.ops.dgl_ext.linear_head_forward.default([X], [rand(3, 5).to_sparse()], [None], [])


@pytest.mark.parametrize("head", ["linear_head", "film_head"])
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [None, None], "grad_outputs: expected 3 entries, got 2"),
        (0, [rand(4, 2), None, None], "grad_outputs[0]: expected shape (4, 3), got (4, 2)"),
        (0, [None, F64, None], "grad_outputs[1]: expected float32 as features[0], got float64"),
        (-5, [True], "needs_features: expected 2 entries, got 1"),
        (-4, [], "needs_weights: expected"),
        (-3, [], "needs_biases: expected"),
        (-6, [None], "present: expected 2 entries, got 1"),
        (-6, [None, MASK[:2]], "present[1]: expected shape (4,), got (2,)"),
        (-6, [MASK.long(), None], "present[0]: expected bool, got int64"),
        (-2, 1.5, "encoder_leak: expected a number in [0, 1], got 1.5"),
        (-1, float("nan"), "head_leak: expected a number in [0, 1], got nan"),
    ],
)
def test_raw_backward_ops_check_too(head, position, value, message):
    problem = make_problem(
        "film" if head == "film_head" else "concat",
        leading=(ROWS,),
        dtype=torch.float32,
        requires_grad=False,
    )
    count = len(problem.weights)
    extra = [list(problem.biases), rand(ROWS, 8)] if head == "film_head" else []
    arguments = [
        [rand(ROWS, CLASSES) for _ in range(3)],
        list(problem.features),
        list(problem.weights),
        *extra,
        [],
        [True, True],
        [True] * count,
        [True] * count,
        0.0,
        0.0,
    ]
    arguments[position] = value
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.dgl_ext, f"{head}_backward").default(*arguments)
    assert f"dgl_ext::{head}_backward: {message}" in str(raised.value)


@pytest.mark.parametrize(
    ("film_activations", "message"),
    [
        (rand(ROWS, 7), "film: expected shape (4, 8), got (4, 7)"),
        (rand(ROWS, 8).double(), "film: expected float32, got float64"),
    ],
)
def test_raw_film_backward_checks_what_forward_kept(film_activations, message):
    problem = make_problem("film", leading=(ROWS,), dtype=torch.float32, requires_grad=False)
    groups = [list(problem.features), list(problem.weights), list(problem.biases)]
    needs = [[True, True]] * 3
    grads = [rand(ROWS, CLASSES) for _ in range(3)]
    with pytest.raises(RuntimeError) as raised:
        torch.ops.dgl_ext.film_head_backward.default(
            grads, *groups, film_activations, [], *needs, 0.0, 0.0
        )
    assert f"dgl_ext::film_head_backward: {message}" in str(raised.value)

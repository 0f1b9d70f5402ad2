"""The training step on a GPU: losses, hits and gradients.

Truth is the reference in float64 on the CPU, so no library of the GPU's takes part in it. Beside
this file: `test_gpu_step_autograd.py`, and `test_gpu_step_streams.py` on launches and memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from support.problems import (
    LAYOUTS,
    UPSTREAM,
    Problem,
    assert_no_less_exact,
    assert_same,
    error,
    loss_gradients,
    magnitude,
    make_present,
    make_problem,
    make_target,
)
from support.two_pass import named_loss
from test_gpu import (
    ALIGNED,
    KERNELS,
    LARGER,
    LARGEST,
    LEAKS,
    LOW_DTYPES,
    RAGGED,
    assert_bitwise,
    backends,
    dtypes,
    every_backend,
    exact_products,  # noqa: F401 (a fixture)
    float32_products,
    heads,
    heads_and_modalities,
    on_device,
    reason_to_skip,
    sizes,
)
from torch import Tensor

import dgl_ext

_REASON = reason_to_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON)]

Results = dict[str, Tensor | None]

ALPHA = (1.5, 0.0, -0.5, 2.0, 1.0, 3.0, 0.25, 4.0)
MIXED = {"encoder_leak": 0.5, "head_leak": 0.25, "label_smoothing": 0.1, "alpha": (2.0, 0.5)}
WHOLE, TINY = None, 1  # workspace limits; the second gives chunks of one tile of rows
# A thread sums a column of at most 300 rows one after the other, a library for GPUs in a tree.
ROUNDINGS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}

low_dtypes = pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
executors = pytest.mark.parametrize(
    ("backend", "limit"),
    [(KERNELS, WHOLE), (KERNELS, TINY), ("library", WHOLE)],
    ids=["whole", "chunked", "library"],
)
limits = pytest.mark.parametrize("limit", [WHOLE, TINY], ids=["whole", "chunked"])


@contextlib.contextmanager
def workspace(limit: int | None) -> Iterator[None]:
    """Bounds what steps keep; None: as it is. gpu_check.py may have to do without conftest.py."""
    before = dgl_ext.workspace_limit()
    dgl_ext.set_workspace_limit(before if limit is None else limit)
    try:
        yield
    finally:
        dgl_ext.set_workspace_limit(before)


def evaluate(
    problem: Problem,
    target: Tensor,
    backend: str,
    upstream: float = 1.0,
    present: Sequence[Tensor | None] | None = None,
    **options: object,
) -> Results:
    """All that a step computes, where the problem's tensors are, taken to the CPU."""
    device = problem.features[0].device
    if present is not None:
        present = [None if mask is None else on_device(mask, device) for mask in present]
    loss = problem.step(
        dgl_ext.fused_decouple_cross_entropy,
        on_device(target, device),
        backend=backend,
        present=present,
        **options,
    )
    found = named_loss(loss.total, loss.fused, loss.unimodal)
    found |= {"correct": loss.correct, **loss_gradients(loss, problem, upstream)}
    return {name: None if t is None else t.detach().cpu() for name, t in found.items()}


def without_hits(results: Results) -> Results:
    """Where logits are rounded, equal ones may be other ones."""
    return {name: tensor for name, tensor in results.items() if name != "correct"}


def check(backend: str, problem: Problem, target: Tensor, **options: object) -> Results:
    """A float64 problem on the device against the reference on the CPU."""
    expected = evaluate(problem, target, "reference", **options)
    found = evaluate(problem.map(on_device), target, backend, **options)
    assert_same(found, expected, 1e-11)
    assert torch.equal(found["correct"], expected["correct"])
    return found


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second one in memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


# --- values in float64 ---


@backends
@pytest.mark.parametrize("leading", [(), (1,), (3, 7), (33,), (257,)], ids=str)
@pytest.mark.parametrize("classes", [1, 6, 70])
@heads
def test_float64_for_every_shape(head, backend, leading, classes):
    problem = make_problem(head, leading=leading, widths=(37, 18), classes=classes)
    check(backend, problem, make_target(problem))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(34,), (2, 3, 4)], ids=str)
@heads
def test_float64_for_every_layout(head, backend, layout, leading):
    problem = make_problem(head, layout=layout, leading=leading, widths=(24, 17), classes=12)
    target, present = make_target(problem, ignored=0.2), make_present(problem)
    if layout != "contiguous":
        target, present = strided(target), [strided(mask) for mask in present]
    check(backend, problem, target, present=present)


@backends
@pytest.mark.parametrize(("head", "count"), heads_and_modalities())
def test_float64_for_every_number_of_modalities(head, backend, count):
    problem = make_problem(head, widths=(9, 16, 1, 40, 7, 8, 3, 33)[:count], leading=(41,))
    target, present = make_target(problem, ignored=0.2), list(make_present(problem))
    present[-1] = None
    check(backend, problem, target, alpha=ALPHA[:count])
    check(backend, problem, target, alpha=ALPHA[:count], present=present, head_leak=0.25)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@heads
def test_float64_with_options_of_cross_entropy(
    head, backend, reduction, label_smoothing, ignore_index
):
    problem = make_problem(head, **RAGGED)
    target = make_target(problem, ignored=0.3, ignore_index=ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    check(backend, problem, target, label_smoothing=label_smoothing, **options)


@backends
@pytest.mark.parametrize("leaks", LEAKS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@heads
def test_float64_with_leaks_and_masks(head, backend, leaks, bias, masked):
    problem = make_problem(head, bias=bias, **RAGGED)
    target = make_target(problem, ignored=0.2)
    present = make_present(problem) if masked else None
    options = {"encoder_leak": leaks[0], "head_leak": leaks[1], "label_smoothing": 0.1}
    check(backend, problem, target, present=present, alpha=(1.5, -0.5), **options)


@backends
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@heads
def test_every_subset_of_requires_grad(head, backend, leaks):
    problem = make_problem(head, leading=(5,), widths=(6, 9), classes=4)
    target = make_target(problem)
    tensors = [tensor for _, tensor in problem.named()]
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        check(backend, problem, target, encoder_leak=leaks[0], head_leak=leaks[1])


@backends
@heads
def test_the_first_of_equal_maxima_is_the_hit(head, backend):
    problem = make_problem(head, leading=(70,), widths=(16, 16), classes=70)
    with torch.no_grad():
        for tensor in (*problem.weights, *problem.biases):
            tensor.zero_()
        problem.biases[-1][[37, 40, 69]] = 1.0
    found = check(backend, problem, torch.arange(70))
    assert found["correct"][0] == 1


# --- rows that do not count ---


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("leading", [(0,), (0, 5), (37,)], ids=str)
@heads
def test_no_row_counts(head, backend, reduction, leading):
    """All ignored, or none there: a mean of NaN, a sum of 0, gradients of zero."""
    problem = make_problem(head, leading=leading, dtype=torch.float32)
    target = torch.full(leading, -100)
    moved = problem.map(on_device)
    found = evaluate(moved, target, backend, reduction=reduction, **MIXED)
    for name in ("total", "fused", "unimodal[0]", "unimodal[1]"):
        assert found[name].isnan() if reduction == "mean" else found[name] == 0, name
    assert found["correct"].tolist() == [0, 0, 0]
    for name, tensor in problem.named():
        assert found[name].shape == tensor.shape
        assert not found[name].any(), name


@backends
@heads
def test_a_modality_that_is_nowhere_adds_nothing(head, backend):
    problem = make_problem(head, **RAGGED)
    present = [None, torch.zeros(RAGGED["leading"], dtype=torch.bool)]
    found = check(backend, problem, make_target(problem), present=present, **MIXED)
    assert found["unimodal[1]"] == 0
    assert not found["features[1]"].any()


@backends
@limits
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@heads
def test_an_absent_row_is_not_read(head, backend, limit, dtype, value):
    """Bitwise, so that not even zero times it comes in; and its own gradient is zero."""
    problem = make_problem(head, dtype=dtype, **ALIGNED)
    target, present = make_target(problem, ignored=0.2), make_present(problem)
    results = []
    with workspace(limit):
        for _ in range(2):
            moved = problem.map(on_device)
            results.append(evaluate(moved, target, backend, present=present, **MIXED))
            with torch.no_grad():
                for h, mask in zip(problem.features, present, strict=True):
                    h[~mask] = value
    assert_bitwise(results[1], results[0])
    for i, mask in enumerate(present):
        assert not results[1][f"features[{i}]"][~mask].any()
        assert results[1][f"features[{i}]"].isfinite().all()


# --- what is not finite ---


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@heads
def test_poison_stays_in_its_row_and_the_sums_that_hold_it(head, backend, value):
    problem = make_problem(head, **ALIGNED)
    target = make_target(problem)
    with torch.no_grad():
        problem.features[1][2, 1] = value
    expected = evaluate(problem, target, "reference")
    found = evaluate(problem.map(on_device), target, backend)
    for name, truth in expected.items():
        assert torch.equal(found[name].isfinite(), truth.isfinite()), name
    assert found["features[1]"].isfinite().any()


@backends
@heads
def test_a_bias_of_minus_infinity_masks_a_class(head, backend):
    problem = make_problem(head, **RAGGED)
    with torch.no_grad():
        problem.biases[-1][5] = float("-inf")
    found = check(backend, problem, make_target(problem) % 5)
    assert found["total"].isfinite()


# --- chunks ---


@backends
@pytest.mark.parametrize("limit", [TINY, 30_000])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@heads
def test_chunks_give_what_the_whole_gives(head, backend, limit, masked, leaks):
    problem = make_problem(head, leading=(150,), widths=(40, 24), classes=37)
    target = make_target(problem, ignored=0.2)
    present = make_present(problem) if masked else None
    options = {"present": present, "encoder_leak": leaks[0], "head_leak": leaks[1]}
    with workspace(limit):
        check(backend, problem, target, label_smoothing=0.1, **options)


@backends
@low_dtypes
@sizes
@heads
def test_chunks_are_no_less_exact_than_the_whole_has_to_be(head, backend, dtype, size):
    # A tile at a time; the library, which would take row by row, about 24 rows.
    limit = TINY if backend == KERNELS else 400 * size["classes"]
    with workspace(limit):
        check_two_references(head, backend, dtype, **size, **MIXED)


@executors
@sizes
@dtypes
@heads
def test_same_input_gives_same_bits(head, dtype, size, backend, limit):
    problem = make_problem(head, dtype=dtype, **size).map(on_device)
    target, present = make_target(problem, ignored=0.2).cpu(), make_present(problem)
    with workspace(limit):
        first, *others = (
            evaluate(problem, target, backend, 1 / 3, present=present, **MIXED) for _ in range(5)
        )
    for again in others:
        assert_bitwise(again, first)


# --- other dtypes ---


def check_two_references(
    head: str,
    backend: str,
    dtype: torch.dtype,
    *,
    leading: tuple[int, ...],
    widths: tuple[int, ...],
    classes: int,
    upstream: float = 1.0,
    **options: object,
) -> None:
    """No worse than plain PyTorch on the same device in the same dtype."""
    problem = make_problem(head, leading=leading, widths=widths, classes=classes, dtype=dtype)
    target = make_target(problem, ignored=0.1)
    options["present"] = make_present(problem, share=0.8)
    moved = problem.map(on_device)
    truth = evaluate(problem.to(torch.float64), target, "reference", upstream, **options)
    composition = evaluate(moved, target, "reference", upstream, **options)
    actual = evaluate(moved, target, backend, upstream, **options)
    for name, value in without_hits(actual).items():
        assert value.dtype == (dtype if name in dict(problem.named()) else torch.float32), name
    results = map(without_hits, (actual, composition, truth))
    assert_no_less_exact(*results, dtype, ROUNDINGS[dtype])


@backends
@low_dtypes
@sizes
@pytest.mark.parametrize("upstream", UPSTREAM, ids=str)
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@heads
def test_other_dtypes_are_no_worse_than_pytorch(head, backend, dtype, size, upstream, leaks):
    options = {**MIXED, "encoder_leak": leaks[0], "head_leak": leaks[1]}
    check_two_references(head, backend, dtype, upstream=upstream, **size, **options)


@every_backend
@low_dtypes
@heads
def test_other_dtypes_at_a_larger_size(head, backend, dtype):
    """Several tiles in every direction, with ragged ends."""
    check_two_references(head, backend, dtype, **LARGEST)


@backends
@heads
def test_float16_gradients_do_not_underflow_before_they_are_scaled(head, backend):
    """A million rows: 1/n times a residual has two digits left in float16."""
    problem = make_problem(head, leading=(1_000_000,), widths=(4, 3), dtype=torch.float16)
    target = make_target(problem)
    truth = evaluate(problem.to(torch.float64), target, "reference", 65536.0)
    actual = evaluate(problem.map(on_device), target, backend, 65536.0)
    for i in range(2):
        exact = truth[f"features[{i}]"]
        assert error(actual[f"features[{i}]"], exact) <= 2**-8 * magnitude(exact)


@backends
@heads
def test_tf32_is_no_worse_than_pytorch_with_tf32(head, backend):
    problem = make_problem(head, dtype=torch.float32, **LARGER)
    target, moved = make_target(problem), problem.map(on_device)
    truth = evaluate(problem.to(torch.float64), target, "reference", **MIXED)
    with float32_products("tf32"):
        composition, actual = (
            evaluate(moved, target, name, **MIXED) for name in ("reference", backend)
        )
    # A loss is one number, whose error is luck; of gradients the largest error counts.
    for name in ("total", "fused", "unimodal[0]", "unimodal[1]"):
        assert error(actual[name], truth[name]) <= 2**-10 * magnitude(truth[name]), name
    for results in (actual, composition, truth):
        for name in [name for name in results if name not in dict(problem.named())]:
            del results[name]
    assert_no_less_exact(actual, composition, truth, torch.float32, ROUNDINGS[torch.float32])


@heads
def test_tf32_only_where_torch_allows_it(head):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with tf32")
    problem = make_problem(head, dtype=torch.float32, **LARGER).map(on_device)
    target, results = make_target(problem).cpu(), []
    for precision in ("ieee", "tf32", "ieee"):
        with float32_products(precision):
            results.append(evaluate(problem, target, KERNELS))
    assert_bitwise(results[0], results[2])
    assert not torch.equal(results[0]["weight[0]"], results[1]["weight[0]"])

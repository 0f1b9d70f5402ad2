"""The torch-free row passes of csrc/cpu, against numpy: strides, ranges, absent terms, in place."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("DGL_EXT_CPP_TESTS", ROOT / "build" / "cpp"))
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


@pytest.fixture(scope="module")
def modules():
    if not list(BUILD.glob("dgl_core*.so")):
        pytest.skip(f"no C++ tests in {BUILD}: `make cpp-tests` builds them")
    sys.path.insert(0, str(BUILD))
    try:
        return importlib.import_module("dgl_core")
    finally:
        sys.path.remove(str(BUILD))


@pytest.fixture(params=["float32", "float64"])
def core(request, modules):
    return getattr(modules, request.param)


@pytest.fixture
def draw(request):
    """Random matrices of the module's dtype; `flipped` ones lie column by column."""
    generator = np.random.default_rng(0)
    dtype = request.node.callspec.params["core"]

    def make(*shape: int, flipped: bool = False) -> np.ndarray:
        values = generator.standard_normal(shape).astype(dtype)
        return np.asfortranarray(values) if flipped else values

    return make


def check(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[actual.dtype.name] * 50)


def poisoned(like: np.ndarray, *shape: int) -> np.ndarray:
    return np.full(shape or like.shape, np.nan, dtype=like.dtype)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (4, 130)])
def test_add_bias(core, draw, shape, flipped):
    values, bias = draw(*shape, flipped=flipped), draw(shape[1])
    out = poisoned(values)
    out = np.ascontiguousarray(out)
    core.add_bias(values, bias, out, (0, shape[0]))
    check(out, values + bias)


def test_add_bias_in_place(core, draw):
    values, bias = draw(6, 37), draw(37)
    expected = values + bias
    core.add_bias(values, bias, values, (0, 6))
    check(values, expected)


def test_a_range_of_rows_writes_no_others(core, draw):
    values, bias = draw(7, 5), draw(5)
    out = poisoned(values)
    core.add_bias(values, bias, out, (2, 4))
    check(out[2:4], (values + bias)[2:4])
    assert np.isnan(out[:2]).all()
    assert np.isnan(out[4:]).all()


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_combine_logits(core, draw, count, flipped, in_place):
    partials = [draw(6, 9, flipped=flipped) for _ in range(count)]
    biases, fused_bias = [draw(9) for _ in range(count)], draw(9)
    expected = [p + b for p, b in zip(partials, biases, strict=True)]
    expected_fused = sum(partials) + fused_bias
    writes_into_input = in_place and not flipped
    logits = partials if writes_into_input else [poisoned(fused_bias, 6, 9) for _ in partials]
    fused = poisoned(fused_bias, 6, 9)
    core.combine_logits(partials, biases, logits, fused_bias, fused, (0, 6))
    check(fused, expected_fused)
    for found, want in zip(logits, expected, strict=True):
        check(found, want)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_mix_and_column_sums(core, draw, count):
    pairs = [(draw(11, 70, flipped=k == 1), 0.5 + k) for k in range(count)]
    expected = sum((scale * values for values, scale in pairs), np.zeros((11, 70)))
    out = poisoned(draw(1), 11, 70)
    core.mix(pairs, out, (0, 11))
    check(out, expected)
    sums = poisoned(draw(1), 70)
    core.column_sums(pairs, 11, sums, (0, 65))
    core.column_sums(pairs, 11, sums, (65, 70))
    check(sums, expected.sum(axis=0))


def test_column_sums_do_not_depend_on_how_the_columns_are_cut(core, draw):
    pairs = [(draw(1000, 100), 1.0)]
    whole, cut = poisoned(draw(1), 100), poisoned(draw(1), 100)
    core.column_sums(pairs, 1000, whole, (0, 100))
    for begin, end in ((0, 7), (7, 64), (64, 99), (99, 100)):
        core.column_sums(pairs, 1000, cut, (begin, end))
    assert np.array_equal(whole, cut)


def test_column_sums_keep_bits_over_many_rows(modules):
    values = np.full((2_000_000, 1), 0.1, dtype=np.float32)
    out = np.zeros(1, dtype=np.float32)
    modules.float32.column_sums([(values, 1.0)], len(values), out, (0, 1))
    exact = float(np.float32(0.1)) * len(values)
    assert abs(out[0] - exact) <= np.spacing(np.float32(exact))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, True)])
def test_film_hidden(core, draw, flipped, wanted):
    film, y, bias = draw(5, 8), draw(5, 4, flipped=flipped), draw(8)
    gamma, beta = film[:, :4], film[:, 4:]
    expected = (gamma * y + beta, beta, bias[:4] * y + bias[4:])
    outputs = [poisoned(draw(1), 5, 4) if want else None for want in wanted]
    core.film_hidden(film, y, bias, *outputs, (0, 5))
    for found, want in zip(outputs, expected, strict=True):
        if found is not None:
            check(found, want)


@pytest.mark.parametrize("absent", ["none", "d", "d_x"])
def test_film_grad(core, draw, absent):
    d, d_x, y = draw(5, 4), draw(5, 4), draw(5, 4, flipped=True)
    out = poisoned(d, 5, 8)
    core.film_grad(
        None if absent == "d" else d, 0.5, None if absent == "d_x" else d_x, 0.25, y, out, (0, 5)
    )
    d, d_x = d * (absent != "d"), d_x * (absent != "d_x")
    check(out, np.concatenate([0.5 * d * y, 0.5 * d + 0.25 * d_x], axis=1))


@pytest.mark.parametrize("absent", ["none", "d", "d_y"])
def test_film_grad_target(core, draw, absent):
    d, d_y, film, bias = draw(5, 4), draw(5, 4), draw(5, 8), draw(8)
    out = poisoned(d)
    core.film_grad_target(
        None if absent == "d" else d, 0.5, film, None if absent == "d_y" else d_y, bias, out, (0, 5)
    )
    d, d_y = d * (absent != "d"), d_y * (absent != "d_y")
    check(out, 0.5 * film[:, :4] * d + bias[:4] * d_y)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, modules):
    wanted = getattr(modules.Isa, request.param)
    if int(wanted) > int(modules.isa()):
        pytest.skip(f"this processor has no {request.param}")
    return wanted


SIZES = [1, 3, 4, 7, 8, 9, 31, 64, 65]


def test_dots(core, draw, isa):
    for rows, classes, width in itertools.product((1, 5), SIZES, SIZES):
        x = draw(rows, width + 3)[:, :width]  # rows that lie further apart than they are long
        w = draw(classes, width + 1)[:, 1:]
        out = poisoned(x, rows, classes)
        core.matmul_dots(x, w, out, (0, rows), isa)
        check(out, x @ w.T)


@pytest.mark.parametrize("flipped", ["none", "a", "b", "out"])
def test_product(core, draw, isa, flipped):
    counts = (0, 1, 6, 33, 600)  # the last in several blocks
    for rows, columns, count in itertools.product(SIZES, SIZES, counts):
        a = draw(rows, count, flipped=flipped == "a")
        b = draw(count, columns + 2, flipped=flipped == "b")[:, :columns]
        out = poisoned(a, rows, columns + 5)
        out = (np.asfortranarray(out) if flipped == "out" else out)[:, :columns]
        core.matmul_packed(a, b, out, (0, rows), (0, columns), isa, False)
        check(out, a @ b)
        core.matmul_packed(a, b, out, (0, rows), (0, columns), isa, True)
        check(out, 2 * (a @ b))


def test_products_write_their_ranges_only(core, draw, isa):
    a, b = draw(9, 4), draw(4, 40)
    out = poisoned(a, 9, 40)
    core.matmul_packed(a, b, out, (2, 7), (3, 30), isa, False)
    check(out[2:7, 3:30], (a @ b)[2:7, 3:30])
    out[2:7, 3:30] = np.nan
    assert np.isnan(out).all()


def test_bits_do_not_depend_on_ranges(core, draw, isa):
    a, b, w = draw(40, 300), draw(300, 70), draw(9, 300)
    whole, cut = poisoned(a, 40, 70), poisoned(a, 40, 70)
    core.matmul_packed(a, b, whole, (0, 40), (0, 70), isa, False)
    for rows in ((0, 7), (7, 40)):
        for columns in ((0, 64), (64, 67), (67, 70)):
            core.matmul_packed(a, b, cut, rows, columns, isa, False)
    np.testing.assert_array_equal(cut, whole)
    whole, cut = poisoned(a, 40, 9), poisoned(a, 40, 9)
    core.matmul_dots(a, w, whole, (0, 40), isa)
    for rows in ((0, 13), (13, 40)):
        core.matmul_dots(a, w, cut, rows, isa)
    np.testing.assert_array_equal(cut, whole)


def softmax_loss(logits, target, smoothing, scale):
    """Losses and residuals of rows that all count, in float64."""
    rows, classes = logits.shape
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_p = shifted - log_sum
    wanted = np.zeros((rows, classes))
    wanted[np.arange(rows), target] = 1 - smoothing
    wanted += smoothing / classes
    return -(wanted * log_p).sum(axis=1), scale * (np.exp(log_p) - wanted)


def cross_entropy(
    core, logits, target, isa, *, ignore=-100, present=None, smoothing=0.0, scale=1.0,
    shares=None, class_weight=None, sample_weight=None,
):  # fmt: skip
    """Losses, residuals and hits; losses and untouched rows start as NaN."""

    def run(values, residual):
        losses = np.full(len(logits), np.nan, dtype=logits.dtype)
        predictions = np.full(len(logits), -1)
        correct = core.cross_entropy_rows(
            values, target, shares, class_weight, sample_weight, ignore, present, smoothing, scale,
            residual, losses, predictions, (0, len(logits)), isa,
        )  # fmt: skip
        np.testing.assert_array_equal(predictions, logits.argmax(axis=1))
        return losses, correct

    values, kept = logits.copy(), logits.copy()
    losses, correct = run(values, True)
    again, hits = run(kept, False)
    np.testing.assert_array_equal(kept, logits)  # without residuals the logits stay
    np.testing.assert_array_equal(again, losses)
    assert hits == correct
    return losses, values, correct


@pytest.mark.parametrize("classes", [1, 2, 8, 9, 33, 500])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weights", [(), ("class",), ("sample",), ("class", "sample")])
@pytest.mark.parametrize("soft", [False, True])
def test_weighted_and_soft_rows(core, draw, isa, classes, smoothing, weights, soft):
    logits, random = draw(6, classes) * 3, np.random.default_rng(1)
    dtype = logits.dtype
    target = random.integers(0, classes, 6)
    shares = random.random((6, classes)).astype(dtype) if soft else None
    of_class = random.random(classes).astype(dtype) if "class" in weights else None
    of_sample = random.random(6).astype(dtype) if "sample" in weights else None
    losses, residuals, correct = cross_entropy(
        core, logits, None if soft else target, isa, smoothing=smoothing, scale=0.375,
        shares=shares, class_weight=of_class, sample_weight=of_sample,
    )  # fmt: skip
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    log_p = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    wanted = shares if soft else np.eye(classes)[target]
    label = wanted.argmax(axis=1)
    wanted = (1 - smoothing) * wanted.astype(np.float64) + smoothing / classes
    wanted *= 1 if of_class is None else of_class
    rows = 0.375 * (np.ones(6) if of_sample is None else of_sample)[:, None]
    limit = 8 * np.finfo(dtype).eps * (1 + wanted.sum(axis=1))
    assert (np.abs(losses + (wanted * log_p).sum(axis=1)) <= limit * (1 - log_p.min(axis=1))).all()
    want = rows * (wanted.sum(axis=1, keepdims=True) * np.exp(log_p) - wanted)
    assert (np.abs(residuals - want) <= limit[:, None]).all()
    assert correct == (logits.argmax(axis=1) == label).sum()


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 33, 64, 500, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_cross_entropy_rows(core, draw, isa, classes, smoothing):
    logits = draw(6, classes) * 5
    target = np.random.default_rng(1).integers(0, classes, 6)
    losses, residuals, correct = cross_entropy(
        core, logits, target, isa, smoothing=smoothing, scale=0.375
    )
    want_losses, want_residuals = softmax_loss(logits, target, smoothing, 0.375)
    limit = 4 * np.finfo(logits.dtype).eps
    np.testing.assert_allclose(losses, want_losses, rtol=limit, atol=limit)
    np.testing.assert_allclose(residuals, want_residuals, rtol=4 * limit, atol=limit)
    assert correct == (logits.argmax(axis=1) == target).sum()


def test_rows_that_do_not_count_lose_nothing_and_get_zeros(core, draw, isa):
    logits = draw(5, 9)
    logits[[1, 3]] = np.nan  # whatever is in such a row
    target = np.array([2, -7, 0, 4, 8])
    present = np.array([True, True, True, False, True])
    losses, residuals, _ = cross_entropy(core, logits, target, isa, ignore=-7, present=present)
    assert (losses[[1, 3]] == 0).all()
    assert (residuals[[1, 3]] == 0).all()
    counted = [0, 2, 4]
    want_losses, want_residuals = softmax_loss(logits[counted], target[counted], 0.0, 1.0)
    check(residuals[counted], want_residuals)
    np.testing.assert_allclose(losses[counted], want_losses, rtol=1e-5)


@pytest.mark.parametrize("classes", [3, 40])
def test_the_first_of_equal_maxima_and_the_first_nan_are_on_top(core, draw, isa, classes):
    ties = np.zeros((3, classes), dtype=draw(1).dtype)
    ties[:, 1:3] = 1
    assert cross_entropy(core, ties, np.array([0, 1, 2]), isa)[2] == 1
    ties[:, 2] = np.nan
    losses, residuals, correct = cross_entropy(core, ties, np.array([0, 1, 2]), isa)
    assert correct == 1
    assert np.isnan(losses).all()
    assert np.isnan(residuals).all()
    assert cross_entropy(core, ties * np.nan, np.array([0, 1, 2]), isa)[2] == 1


@pytest.mark.parametrize("classes", [5, 29])
def test_masked_classes(core, draw, isa, classes):
    logits = draw(3, classes)
    logits[:, 1] = -np.inf
    target = np.array([0, 2, 1])
    losses, residuals, _ = cross_entropy(core, logits, target, isa)
    assert np.isfinite(losses[:2]).all()
    assert losses[2] == np.inf  # a target that is masked
    assert (residuals[:2, 1] == 0).all()
    assert np.isfinite(residuals).all()
    losses, residuals, _ = cross_entropy(core, logits, target, isa, smoothing=0.1)
    assert (losses == np.inf).all()
    assert np.isfinite(residuals).all()


def test_exponentials_are_exact_to_two_units_in_the_last_place(modules, isa):
    # With two logits the residual of the class that is not the target is e / (1 + e).
    x = -np.concatenate([np.linspace(0, 20, 40_001), np.linspace(20, 87, 10_001), [88, 104, 1e30]])
    logits = np.stack([np.zeros_like(x), x], axis=1).astype(np.float32)
    target = np.zeros(len(x), dtype=np.int64)
    _, residuals, _ = cross_entropy(modules.float32, logits, target, isa)
    exact = np.exp(logits[:, 1].astype(np.float64))
    exact = exact / (1 + exact)
    normal = exact > np.finfo(np.float32).tiny
    error = np.abs(residuals[:, 1] - exact)[normal] / np.spacing(exact[normal].astype(np.float32))
    assert error.max() < 2.5  # two for the exponential, half a unit for the rounded product
    assert (residuals[:, 1][~normal] == 0).all()


def test_many_classes_lose_no_bits(modules, isa):
    logits = np.full((1, 1_000_000), -3.0, dtype=np.float32)
    logits[0, 1::2] = -3.0 + 1e-3
    losses, _, _ = cross_entropy(modules.float32, logits, np.array([0]), isa, smoothing=0.5)
    want, _ = softmax_loss(logits, np.array([0]), 0.5, 1.0)
    np.testing.assert_allclose(losses, want, rtol=1e-7)


def test_a_range_of_rows_depends_on_no_other(core, draw, isa):
    logits, target = draw(7, 37), np.arange(7)
    losses, residuals, _ = cross_entropy(core, logits, target, isa)
    values, cut = logits.copy(), np.full(7, np.nan, dtype=logits.dtype)
    core.cross_entropy_rows(
        values, target, None, None, None, -100, None, 0.0, 1.0, True, cut, np.zeros(7, int), (2, 5),
        isa,
    )  # fmt: skip
    np.testing.assert_array_equal(values[2:5], residuals[2:5])
    np.testing.assert_array_equal(cut[2:5], losses[2:5])
    np.testing.assert_array_equal(values[[0, 1, 5, 6]], logits[[0, 1, 5, 6]])
    assert np.isnan(cut[[0, 1, 5, 6]]).all()


def test_a_nan_stays_one_whatever_its_payload(modules, isa):
    logits = np.zeros((1, 11), dtype=np.float32)
    logits[0, 3] = np.array([0x7FC00001], dtype=np.uint32).view(np.float32)[0]
    losses, residuals, correct = cross_entropy(modules.float32, logits, np.array([3]), isa)
    assert np.isnan(losses).all()
    assert np.isnan(residuals).all()
    assert correct == 1

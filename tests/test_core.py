"""The torch-free row passes of csrc/cpu, against numpy: strides, ranges, absent terms, in place."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(params=[False, True], ids=["portable", "fma"])
def fma(request, modules):
    if request.param and not modules.has_fma():
        pytest.skip("this processor has no AVX2 and FMA")
    return request.param


SIZES = [1, 3, 4, 7, 8, 9, 31, 64, 65]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("width", SIZES)
def test_small_rows_by_rows(core, draw, fma, rows, classes, width):
    x = draw(rows, width + 3)[:, :width]  # rows that lie further apart than they are long
    w = draw(classes, width + 1)[:, 1:]
    out = poisoned(x, rows, classes)
    core.small_rows_by_rows(x, w, out, (0, rows), fma)
    check(out, x @ w.T)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("count", [0, 1, 6, 33])
@pytest.mark.parametrize("flipped", [False, True])
def test_small_product(core, draw, fma, rows, columns, count, flipped):
    a = draw(rows, count, flipped=flipped)
    b = draw(count, columns + 2)[:, :columns]
    out = poisoned(a, rows, columns + 5)[:, :columns]
    core.small_product(a, b, out, (0, rows), (0, columns), fma)
    check(out, a @ b)


def test_small_products_write_their_ranges_only(core, draw, fma):
    a, b = draw(9, 4), draw(4, 40)
    out = poisoned(a, 9, 40)
    core.small_product(a, b, out, (2, 7), (3, 30), fma)
    check(out[2:7, 3:30], (a @ b)[2:7, 3:30])
    out[2:7, 3:30] = np.nan
    assert np.isnan(out).all()

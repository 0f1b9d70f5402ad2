"""The training step from library GEMMs: what is particular to it, and its values in float64.

The raw ops are called, so that what is seen is the step's own, before any scaling.
"""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dgl_ext
from dgl_ext import composed_step
from dgl_ext.testing import assert_same, assert_two_references, make_problem

PLENTY = 2**30
CLASSES = 6


def draw_target(leading, classes=CLASSES, ignored=0.2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, leading, generator=generator)
    return target.masked_fill(torch.rand(leading, generator=generator) < ignored, -100)


def draw_present(problem, seed=4):
    """Masks of all modalities but the last; absent rows are NaN."""
    leading = problem.features[0].shape[:-1]
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(leading, generator=generator) < 0.6 for _ in problem.features[1:]]
    with torch.no_grad():
        for h, mask in zip(problem.features, masks, strict=False):
            h[~mask] = float("nan")
    return [*masks, None]


def arguments(
    problem,
    target,
    *,
    alpha=1.0,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    present=(),
    encoder_leak=0.0,
    head_leak=0.0,
    limit=PLENTY,
    needs=None,
):
    groups = [list(group) for group in (problem.features, problem.weights, problem.biases)]
    count = len(problem.features)
    return (
        *groups,
        target,
        list(present),
        [alpha] * count if isinstance(alpha, float) else list(alpha),
        reduction == "mean",
        ignore_index,
        label_smoothing,
        *(needs or [[tensor is not None for tensor in group] for group in groups]),
        encoder_leak,
        head_leak,
        limit,
    )


def kernel_name(problem):
    return "film_head_step" if problem.fusion == "film" else "linear_head_step"


@torch.no_grad()
def step(problem, target, scale=1.0, **options):
    """What the op returns, by name."""
    op = getattr(torch.ops.dgl_ext, f"{kernel_name(problem)}_composed")
    total, losses, correct, *grads = op(*arguments(problem, target, **options))
    names = [name for name, _ in problem.named()]
    found = {"total": total, "losses": losses, "correct": correct}
    return found | {name: g * scale for name, g in zip(names, grads, strict=True)}


def reference(problem, target, scale=1.0, **options):
    loss = dgl_ext.reference.fused_decouple_cross_entropy(
        problem.features,
        problem.weight,
        target,
        bias=problem.bias,
        fusion=problem.fusion,
        **{"present": None, **options},
    )
    named = dict(problem.named())
    upstream = torch.tensor(scale, dtype=loss.total.dtype)
    grads = torch.autograd.grad(loss.total, list(named.values()), upstream)
    losses = torch.stack([loss.fused, *loss.unimodal])
    found = {"total": loss.total.detach(), "losses": losses, "correct": loss.correct}
    return found | dict(zip(named, grads, strict=True))


def assert_equal(found, expected):
    """As `assert_same`, where some are NaN."""
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name
    assert_same(*({k: t.nan_to_num() for k, t in v.items()} for v in (found, expected)), 1e-11)


def widths_of(fusion):
    return (5, 4) if fusion == "film" else (5, 4, 3)


# --- values ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_the_reference(fusion, masked, label_smoothing, leaks, reduction):
    problem = make_problem(fusion, leading=(5, 7), widths=widths_of(fusion), classes=CLASSES)
    options = {
        "label_smoothing": label_smoothing,
        "encoder_leak": leaks[0],
        "head_leak": leaks[1],
        "reduction": reduction,
        "alpha": [0.7, -2.0, 0.0][: len(problem.features)],
    }
    if masked:
        options["present"] = draw_present(problem)
    target = draw_target((5, 7))
    expected = reference(problem, target, **options)
    assert_same(step(problem, target, **options), expected, 1e-11)
    a_row_at_a_time = step(problem, target, limit=1, **options)
    assert_same(a_row_at_a_time, expected, 1e-11)


@pytest.mark.parametrize("widths", [(5,), (4, 1), (3, 4, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_equals_the_reference_for_any_layout(fusion, widths, bias, layout):
    if fusion == "film" and len(widths) != 2:
        widths = (2, 6)
    problem = make_problem(
        fusion, leading=(3, 5), widths=widths, classes=CLASSES, bias=bias, layout=layout
    )
    target = draw_target((5, 3)).t()
    options = {"encoder_leak": 0.5, "head_leak": 0.5}
    expected = reference(problem, target, **options)
    assert_same(step(problem, target, **options), expected, 1e-11)
    assert_same(step(problem, target, limit=4 * 8 * 4 * CLASSES, **options), expected, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("leading", [(0,), (2, 0), (), (1,), (4,)])
@pytest.mark.parametrize("classes", [1, 3])
def test_few_rows_and_classes(fusion, reduction, leading, classes):
    problem = make_problem(fusion, leading=leading, classes=classes)
    target = draw_target(leading, classes, ignored=0)
    expected = reference(problem, target, reduction=reduction)
    assert_equal(step(problem, target, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_all_rows_ignored(fusion, reduction, masked):
    problem = make_problem(fusion, leading=(5,))
    options = {"reduction": reduction, "head_leak": 0.5, "encoder_leak": 0.5}
    if masked:
        options["present"] = draw_present(problem)
    target = torch.full((5,), -100)
    found = step(problem, target, **options)
    assert_equal(found, reference(problem, target, **options))
    assert found["total"].isnan() == (reduction == "mean")
    assert not any(found[name].any() for name, _ in problem.named())


def test_a_modality_that_no_counted_row_has(fusion):
    problem = make_problem(fusion, leading=(5,), classes=CLASSES)
    present = [torch.tensor([False, False, True, False, False]), None]
    target = torch.tensor([1, 0, -100, 3, 5])
    options = {"present": present, "encoder_leak": 0.5, "head_leak": 0.5}
    found = step(problem, target, **options)
    assert_same(found, reference(problem, target, **options), 1e-11)
    assert found["losses"][1] == 0
    assert found["losses"][2] != 0
    assert not found["features[0]"].any()


def test_absent_rows_have_gradients_of_exactly_zero_whatever_the_weight(fusion):
    problem = make_problem(fusion, leading=(6,), classes=CLASSES)
    present = draw_present(problem)
    with torch.no_grad():
        problem.weights[-1][0, 0] = float("inf")
    found = step(problem, draw_target((6,)), present=present, encoder_leak=1.0)
    assert not found["features[0]"][~present[0]].any()


def test_an_ignore_index_that_is_a_class(fusion):
    problem = make_problem(fusion, leading=(9,), classes=3)
    target = draw_target((9,), 3, ignored=0)
    expected = reference(problem, target, ignore_index=1)
    assert_same(step(problem, target, ignore_index=1), expected, 1e-11)


@pytest.mark.parametrize("bad", [-1, 3, -101, 2**40])
@pytest.mark.parametrize("masked", [False, True])
def test_a_target_out_of_range_is_an_error(fusion, bad, masked):
    problem = make_problem(fusion, leading=(4,), classes=3)
    present = [torch.zeros(4, dtype=torch.bool)] * 2 if masked else ()
    with pytest.raises(RuntimeError, match=rf"target: .*\[0, 3\).*ignore_index -100, got {bad}$"):
        step(problem, torch.tensor([0, bad, 1, -100]), present=present)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_make_no_nan(fusion, smoothing):
    problem = make_problem(fusion, leading=(8,), classes=CLASSES)
    with torch.no_grad():
        problem.biases[-1][2] = -float("inf")
    target = draw_target((8,)).masked_fill(draw_target((8,)) == 2, 1)
    found = step(problem, target, label_smoothing=smoothing)
    assert_same(found, reference(problem, target, label_smoothing=smoothing), 1e-11)
    assert torch.isfinite(found["total"]) == (smoothing == 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_poisons_what_the_reference_poisons(fusion, value):
    problem = make_problem(fusion, leading=(6,), classes=CLASSES)
    with torch.no_grad():
        problem.features[1][2, 1] = value
    target = draw_target((6,), ignored=0)
    found, expected = step(problem, target), reference(problem, target)
    for name in expected:
        assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name


def test_the_first_of_equal_maxima_is_the_hit(fusion):
    problem = make_problem(fusion, leading=(4,), classes=3).map(torch.zeros_like)
    found = step(problem, torch.tensor([0, 0, 1, 2]))
    assert found["correct"].tolist() == [2, 2, 2]


def test_it_is_the_kernel_of_the_backend(fusion):
    problem = make_problem(fusion, leading=(12,), classes=CLASSES)
    target = draw_target((12,))
    loss = dgl_ext.fused_decouple_cross_entropy(
        problem.features, problem.weight, target, bias=problem.bias, fusion=fusion,
        backend="composed",
    )  # fmt: skip
    named = dict(problem.named())
    grads = torch.autograd.grad(loss.total, list(named.values()))
    expected = step(problem, target)
    found = {"total": loss.total, "losses": torch.stack([loss.fused, *loss.unimodal])}
    found |= {"correct": loss.correct, **dict(zip(named, grads, strict=True))}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- which gradients ---


def test_each_gradient_alone_is_what_it_is_among_all(fusion):
    problem = make_problem(fusion, leading=(9,), classes=CLASSES)
    target, leaks = draw_target((9,)), {"encoder_leak": 0.5, "head_leak": 0.25}
    expected = step(problem, target, **leaks)
    groups = [problem.features, problem.weights, problem.biases]
    op = getattr(torch.ops.dgl_ext, f"{kernel_name(problem)}_composed")
    for name, tensor in problem.named():
        needs = [[candidate is tensor for candidate in group] for group in groups]
        with torch.no_grad():
            found = op(*arguments(problem, target, needs=needs, **leaks))
        assert len(found) == 4
        assert torch.equal(found[3], expected[name]), name


def test_without_gradients_only_losses_come(fusion):
    problem = make_problem(fusion, leading=(9,), classes=CLASSES)
    target = draw_target((9,))
    with torch.no_grad():
        loss = dgl_ext.fused_decouple_cross_entropy(
            problem.features, problem.weight, target, bias=problem.bias, fusion=fusion,
            backend="composed",
        )  # fmt: skip
    expected = reference(problem, target)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, expected["total"], atol=1e-11, rtol=1e-11)
    assert torch.equal(loss.correct, expected["correct"])


# --- chunks and memory ---


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations take at a time."""

    def __init__(self):
        super().__init__()
        self.peak, self.alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {
            address: entry for address, entry in self.alive.items() if not entry[0].expired()
        }
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leaks", [0.0, 0.5])
@pytest.mark.parametrize("rows_at_a_time", [2, 7])
def test_what_grows_with_rows_and_classes_stays_within_the_limit(
    fusion, dtype, leaks, rows_at_a_time
):
    rows, classes = 60, 5000
    problem = make_problem(fusion, leading=(rows,), widths=(1, 1), classes=classes, dtype=dtype)
    target = draw_target((rows,), classes)
    limit = 4 * 5 * classes * rows_at_a_time
    kernel = getattr(composed_step, kernel_name(problem))
    options = {"limit": limit, "encoder_leak": leaks, "head_leak": leaks}
    with torch.no_grad(), PeakMemory() as memory:
        kernel(*arguments(problem, target, **options))
    # Beside it: the parameters' gradients, one product for one, the 16-bit parameters widened.
    beside = 4 * 4 * 3 * classes
    assert limit / 2 < memory.peak < limit + beside
    assert 4 * 3 * rows * classes > 2 * (limit + beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_give_what_the_whole_gives_and_the_same_bits_again(fusion, dtype):
    problem = make_problem(fusion, leading=(67,), widths=(8, 9), classes=CLASSES, dtype=dtype)
    present, target = draw_present(problem), draw_target((67,))
    options = {"present": present, "encoder_leak": 0.5, "head_leak": 0.5, "label_smoothing": 0.1}
    whole = step(problem, target, **options)
    for rows_at_a_time in (1, 7, 66):
        # 4 bytes of three branches' logits and of one mixture; 6 to narrow that to 16 bits.
        limit = CLASSES * (16 + (6 if dtype.itemsize == 2 else 0)) * rows_at_a_time
        chunked = step(problem, target, limit=limit, **options)
        assert_same(chunked, whole, 2e-6)
        again = step(problem, target, limit=limit, **options)
        assert all(torch.equal(chunked[name], again[name]) for name in chunked)


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1 / 3])
@pytest.mark.parametrize("masked", [False, True])
def test_no_less_exact_than_the_same_dtype_composition(fusion, dtype, leaks, scale, masked):
    problem = make_problem(fusion, leading=(400,), widths=(32, 48), classes=10, dtype=dtype)
    target = draw_target((400,), 10)
    options = {"encoder_leak": leaks[0], "head_leak": leaks[1], "scale": scale}
    if masked:
        options["present"] = draw_present(problem)
    truth = reference(problem.to(torch.float64), target, **options)
    del truth["correct"]
    composition = reference(problem, target, **options)
    for limit in (PLENTY, 10_000):
        found = step(problem, target, limit=limit, **options)
        for values in (found, composition):
            values.pop("correct", None)  # 16-bit logits tie where longer ones do not
            for name in ("total", "losses"):  # means over many roundings of 16-bit logits
                values[name] = values[name].to(dtype)
        if dtype == torch.float16:
            named = [name for name, _ in problem.named()]
            assert {found[name].dtype for name in named} == {torch.float32}
            found |= {name: found[name].half() for name in named}
        assert_two_references(found, composition, truth)


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (1.0, 1.0)])
def test_float16_gradients_neither_underflow_nor_overflow(fusion, leaks):
    """One row of 8,192 has a modality: its residual counts 8,192 times alpha as much as others."""
    rows, alpha = 8192, [1000.0, 1.0]
    problem = make_problem(
        fusion, leading=(rows,), widths=(16, 16), classes=200, dtype=torch.float16
    )
    target = draw_target((rows,), 200)
    target[5] = 7
    present = [torch.arange(rows) == 5, None]
    options = {"alpha": alpha, "encoder_leak": leaks[0], "head_leak": leaks[1], "present": present}
    truth = reference(problem.to(torch.float64), target, **options)
    found = step(problem, target, **options)
    for name, _ in problem.named():
        # Each row by itself: the largest gradient is a million times that of most rows.
        exact = truth[name].reshape(-1, truth[name].shape[-1])
        error = (found[name].double().view_as(exact) - exact).abs()
        bound = 4e-3 * exact.abs().amax(-1, keepdim=True)
        if name.startswith("features"):
            assert (error <= bound).all(), name
        else:
            assert error.max() <= bound.max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_alpha_of_zero_gives_zeros(fusion, dtype):
    problem = make_problem(fusion, leading=(9,), classes=CLASSES, dtype=dtype)
    found = step(problem, draw_target((9,)), alpha=[1.0, 0.0])
    assert not found["features[1]"].any()
    assert all(found[name].any() for name, _ in problem.named() if name != "features[1]")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_cast_the_sums(fusion, dtype):
    problem = make_problem(fusion, leading=(48,), widths=(64, 32), classes=10, dtype=dtype)
    target = draw_target((48,), 10)
    expected = step(problem, target)
    with torch.autocast("cpu", dtype):
        found = step(problem, target)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- devices ---


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_is_read_back_from_a_device(fusion, dtype, reduction):
    """Tensors without data raise where their values are asked for, or meet some on the CPU."""
    problem = make_problem(fusion, leading=(40,), widths=(16, 16), classes=CLASSES, dtype=dtype)
    kernel = getattr(composed_step, kernel_name(problem))
    target = draw_target((40,)).to("meta")
    present = [torch.ones(40, dtype=torch.bool, device="meta"), None]
    options = {"present": present, "encoder_leak": 0.5, "head_leak": 0.5, "limit": 1000}
    with torch.no_grad():
        found = kernel(*arguments(problem.to("meta"), target, reduction=reduction, **options))
    assert [g.shape for g in found[3:]] == [tensor.shape for _, tensor in problem.named()]
    assert {g.device.type for g in found} == {"meta"}
    assert {g.dtype for g in found[3:]} == {torch.float32 if dtype == torch.float16 else dtype}

"""The training step computes what the two-pass recipe computes, in float64 to 1e-11."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.grids import one_axis_at_a_time
from support.problems import (
    BACKENDS,
    LAYOUTS,
    assert_same,
    flat,
    loss_gradients,
    make_present,
    make_problem,
    make_target,
)
from support.two_pass import named_loss, plain_head, plain_unimodal, two_pass_loss

import dgl_ext
from dgl_ext._arguments.heads import HEADS

LEAKS = [(0.5, 0.25), (0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (1.0, 1.0)]
WIDTHS = {1: (5,), 2: (5, 4), 3: (5, 4, 6), 8: (3, 1, 4, 2, 5, 2, 6, 7)}


def named(loss):
    return named_loss(loss.total, loss.fused, loss.unimodal)


def alphas(count: int) -> tuple[float, ...]:
    return (1.5, 0.0, -0.5, 2.0, 1.0, 3.0, 0.25, 4.0)[:count]


def step(problem, target, backend, upstream=1.0, **options):
    """Everything that a step gives, by name."""
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options)
    return {**named(loss), "correct": loss.correct, **loss_gradients(loss, problem, upstream)}


def check_against_two_pass(backend, *, options=None, ignored=0.0, **shape):
    options = options or {}
    problem = make_problem(**shape)
    target = make_target(problem, ignored=ignored, ignore_index=options.get("ignore_index", -100))
    alpha = alphas(len(problem.features))
    parts, grads = two_pass_loss(problem, target, alpha=alpha, **options)
    found = step(problem, target, backend, alpha=alpha, **options)
    del found["correct"]
    assert_same(found, {**parts, **grads}, 1e-11)


def check_against_reference(problem, target, backend, **options):
    found = step(problem, target, backend, **options)
    expected = step(problem, target, "reference", **options)
    assert_same(found, expected, 1e-11)
    assert torch.equal(found["correct"], expected["correct"])
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(leading=[(33,), (1,), (3, 7), (130,), ()], classes=[3, 1, 37])
def test_values_and_gradients(fusion, backend, leading, classes):
    check_against_two_pass(backend, fusion=fusion, leading=leading, classes=classes)


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(
    reduction=["mean", "sum"], label_smoothing=[0.1, 0.0, 1.0], ignore_index=[-100, 1]
)
def test_options_of_cross_entropy(fusion, backend, reduction, label_smoothing, ignore_index):
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    check_against_two_pass(backend, options=options, ignored=0.3, fusion=fusion, leading=(29,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(fusion, backend, layout):
    check_against_two_pass(
        backend, fusion=fusion, leading=(9, 4), widths=(6, 5), classes=7, layout=layout
    )


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(modalities=[2, 1, 3, 8], bias=[True, False])
def test_numbers_of_modalities(fusion, backend, modalities, bias):
    if modalities not in HEADS[fusion].modalities:
        pytest.skip(f"{fusion} does not take {modalities}")
    check_against_two_pass(backend, fusion=fusion, widths=WIDTHS[modalities], bias=bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
def test_two_modalities_of_one_width(fusion, backend, turned, leaks):
    """On CUDA the library may take both in one call, whichever lies first in memory."""
    problem = make_problem(fusion, leading=(9,), widths=(6, 6), classes=4)
    in_one_buffer = torch.stack([h.detach() for h in problem.features]).unbind()
    order = reversed(in_one_buffer) if turned else in_one_buffer
    problem.features = tuple(h.requires_grad_() for h in order)
    options = {"alpha": (1.5, 1.5), "encoder_leak": leaks[0], "head_leak": leaks[1]}
    check_against_reference(problem, make_target(problem), backend, **options)


@pytest.fixture(params=[1, 5], ids=["one thread", "five threads"])
def threads(request):
    """How rows and columns are cut, and which of the CPU's products run, depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("rows", "widths", "classes"), [(64, (96, 64), 34), (300, (40, 300), 309)])
def test_sizes_of_a_real_head(fusion, backend, rows, widths, classes, threads):
    check_against_two_pass(backend, fusion=fusion, leading=(rows,), widths=widths, classes=classes)


@pytest.mark.parametrize("rows", [33, 97])
def test_many_classes_with_masks_and_leaks(fusion, rows, threads):
    problem = make_problem(fusion, leading=(rows,), widths=(70, 41), classes=200)
    options = {"encoder_leak": 0.5, "head_leak": 0.25, "present": make_present(problem)}
    check_against_reference(problem, make_target(problem, ignored=0.2), "fused", **options)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("masked", [False, True])
@one_axis_at_a_time(leaks=LEAKS, label_smoothing=[0.2, 0.0])
def test_leaks_and_masks(fusion, backend, leaks, masked, label_smoothing):
    problem = make_problem(fusion, leading=(5, 9), classes=4)
    options = {
        "alpha": (1.5, 0.5),
        "encoder_leak": leaks[0],
        "head_leak": leaks[1],
        "label_smoothing": label_smoothing,
        "present": make_present(problem) if masked else None,
    }
    check_against_reference(problem, make_target(problem, ignored=0.2), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_leaks_are_plain_autograd(fusion, backend):
    problem = make_problem(fusion, leading=(11,))
    target, alpha = make_target(problem), (1.5, 0.5)
    found = step(problem, target, backend, alpha=alpha, encoder_leak=1, head_leak=1)
    plain = [plain_head(problem, problem.features)]
    plain += [plain_unimodal(problem, i) for i in range(len(problem.features))]
    losses = [F.cross_entropy(z, target) for z in plain]
    total = losses[0] + sum(a * loss for a, loss in zip(alpha, losses[1:], strict=True))
    tensors = dict(problem.named())
    grads = torch.autograd.grad(total, list(tensors.values()))
    expected = {
        **named_loss(total, losses[0], losses[1:]),
        **dict(zip(tensors, grads, strict=True)),
    }
    del found["correct"]
    assert_same(found, expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_composition_of_logits_and_losses(fusion, backend):
    """`fused_decouple`, a loss per branch, one backward."""
    problem = make_problem(fusion, leading=(13,))
    target, alpha = make_target(problem, ignored=0.3), (2.0, 0.5)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend)
    losses = [F.cross_entropy(z, target, label_smoothing=0.1) for z in flat(logits)]
    total = losses[0] + sum(a * loss for a, loss in zip(alpha, losses[1:], strict=True))
    tensors = dict(problem.named())
    grads = torch.autograd.grad(total, list(tensors.values()))
    expected = {
        **named_loss(total, losses[0], losses[1:]),
        **dict(zip(tensors, grads, strict=True)),
    }
    found = step(problem, target, backend, alpha=alpha, label_smoothing=0.1)
    del found["correct"]
    assert_same(found, expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_correct_counts_hits_among_the_rows_that_count(fusion, backend):
    problem = make_problem(fusion, leading=(57,), classes=3)
    target = make_target(problem, ignored=0.3)
    present = make_present(problem)
    with torch.no_grad():
        logits = problem.call(dgl_ext.fused_decouple, present=present)
    counts = [target != -100, *((target != -100) & mask for mask in present)]
    expected = [
        ((z.argmax(-1) == target) & count).sum()
        for z, count in zip(flat(logits), counts, strict=True)
    ]
    loss = problem.step(
        dgl_ext.fused_decouple_cross_entropy, target, present=present, backend=backend
    )
    assert loss.correct.tolist() == [int(n) for n in expected]
    assert 0 < loss.correct[0] < 57


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_maxima_is_the_answer(fusion, backend):
    problem = make_problem(fusion, leading=(4,), classes=5)
    with torch.no_grad():
        for _, tensor in problem.named():
            tensor.mul_(4).round_()  # integers: equal however they are summed
        for tensor in (*problem.weights, *problem.biases):
            if tensor.shape[0] == 5:
                tensor.copy_(tensor[:1].expand_as(tensor))
    target = torch.tensor([0, 1, 0, 4])
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend)
    assert loss.correct.tolist() == [2, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_modality_that_is_nowhere_adds_nothing(fusion, backend):
    problem = make_problem(fusion, leading=(6,))
    present = (None, torch.zeros(6, dtype=torch.bool))
    target = make_target(problem)
    found = check_against_reference(problem, target, backend, present=present)
    assert found["unimodal[1]"] == 0
    assert found["total"].isfinite()
    assert not found["features[1]"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absent_row_is_not_read(fusion, backend):
    problem = make_problem(fusion, leading=(12,))
    target, present = make_target(problem), make_present(problem)
    options = {"present": present, "encoder_leak": 0.5, "head_leak": 0.25}
    expected = step(problem, target, backend, **options)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            for h, mask in zip(problem.features, present, strict=True):
                h[~mask] = value
        assert_same(step(problem, target, backend, **options), expected, 0.0)
    for i, mask in enumerate(present):
        assert not expected[f"features[{i}]"][~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_rows_ignored(fusion, backend, label_smoothing):
    """What PyTorch gives: NaN for a mean, 0 for a sum, gradients of zero."""
    problem = make_problem(fusion, leading=(5,))
    target = torch.full((5,), -100)
    for reduction in ("mean", "sum"):
        found = step(problem, target, backend, reduction=reduction, label_smoothing=label_smoothing)
        for name in ("total", "fused", "unimodal[0]", "unimodal[1]"):
            assert found[name].isnan() if reduction == "mean" else found[name] == 0
        assert not found["correct"].any()
        assert not any(found[name].any() for name, _ in problem.named())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (0, 5), (4, 0)], ids=str)
def test_no_rows(fusion, backend, leading):
    problem = make_problem(fusion, leading=leading)
    found = step(problem, make_target(problem), backend)
    assert found["total"].isnan()
    for name, tensor in problem.named():
        assert found[name].shape == tensor.shape
        assert not found[name].any()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("widths", [(1, 1), (0, 4)], ids=str)
def test_minimal_widths(fusion, backend, widths):
    problem = make_problem(fusion, widths=widths)
    check_against_reference(problem, make_target(problem), backend)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_masked_classes(fusion, backend):
    """A bias of minus infinity takes a class away; it must not turn into 0 * inf."""
    problem = make_problem(fusion, leading=(7,), classes=4)
    with torch.no_grad():
        problem.biases[-1][2] = float("-inf")
    target = make_target(problem) % 2
    check_against_reference(problem, target, backend)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_poisons_itself_and_the_sums_that_hold_it(fusion, backend, value):
    problem = make_problem(fusion, leading=(6,))
    with torch.no_grad():
        problem.features[1][2, 1] = value
    target = make_target(problem)
    found, expected = (step(problem, target, b) for b in (backend, "reference"))
    for name, truth in expected.items():
        assert torch.equal(found[name].isfinite(), truth.isfinite()), name
    found, expected = (
        {name: value.nan_to_num(0, 0, 0) for name, value in result.items()}
        for result in (found, expected)
    )
    assert_same(found, expected, 1e-11)
    assert torch.equal(found["correct"], expected["correct"])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("limit", [1, 1500, 6000])
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
def test_chunks_give_what_the_whole_gives(fusion, backend, limit, leaks, workspace_limit):
    problem = make_problem(fusion, leading=(150,), widths=(20, 9), classes=7)
    target, present = make_target(problem, ignored=0.2), make_present(problem)
    options = {"encoder_leak": leaks[0], "head_leak": leaks[1], "label_smoothing": 0.1}
    for masks in (None, present):
        whole = step(problem, target, backend, present=masks, **options)
        workspace_limit(limit)
        chunked = step(problem, target, backend, present=masks, **options)
        workspace_limit(None)
        assert_same(chunked, whole, 1e-12)
        assert torch.equal(chunked["correct"], whole["correct"])


@pytest.mark.parametrize("limit", [None, 10_000])
def test_same_input_gives_same_bits(fusion, limit, workspace_limit):
    workspace_limit(limit)
    problem = make_problem(fusion, leading=(65,), widths=(33, 17), classes=70, dtype=torch.float32)
    target = make_target(problem)
    first, *others = (step(problem, target, "fused") for _ in range(3))
    for again in others:
        assert all(torch.equal(first[name], value) for name, value in again.items())

"""Class and sample weights, soft targets, results of each row: all as `F.cross_entropy`'s."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.grids import one_axis_at_a_time
from support.problems import (
    BACKENDS,
    COMPILED_BACKENDS,
    assert_no_less_exact,
    assert_same,
    flat,
    loss_gradients,
    make_present,
    make_problem,
    make_target,
    random_tensor,
)
from support.two_pass import named_loss, two_pass_loss

import dgl_ext

ALL = ("class_weight", "sample_weight")


def make_soft(problem, *, dtype=torch.float64, seed=5):
    """Shares of the classes that do not quite add up to one, as no one has to see to it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*problem.features[0].shape[:-1], problem.weights[-1].shape[0])
    shares = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (shares / shares.sum(-1, keepdim=True) * 1.1).to(dtype)


def make_weights(problem, names=ALL, *, dtype=torch.float64, seed=4):
    """Weights between 0 and 2, every third of them 0, by name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in names:
        of_class = name == "class_weight"
        shape = problem.weights[-1].shape[:1] if of_class else problem.features[0].shape[:-1]
        weight = 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        weight.view(-1)[2::3] = 0
        weights[name] = weight.to(dtype)
    return weights


def zero_absent(problem, present):
    with torch.no_grad():
        for h, mask in zip(problem.features, present, strict=True):
            h[~mask] = 0


def results(problem, target, backend, upstream=1.0, **options):
    """Every result of a step and every gradient, by name."""
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target, backend=backend, **options)
    rest = {name: getattr(loss, name) for name in ("correct", "count", "losses", "predictions")}
    parts = named_loss(loss.total, loss.fused, loss.unimodal)
    return {**parts, **rest, **loss_gradients(loss, problem, upstream)}


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(
    weights=[ALL, ALL[:1], ALL[1:], ()],
    soft=[False, True],
    reduction=["mean", "sum"],
    label_smoothing=[0.0, 0.1, 1.0],
    masked=[True, False],
    classes=[5, 1, 37, 300],
    limit=[None, 1],
)
def test_against_two_passes(
    fusion, backend, weights, soft, reduction, label_smoothing, masked, classes, limit,
    workspace_limit,
):  # fmt: skip
    workspace_limit(limit)
    problem = make_problem(fusion, leading=(5, 13), widths=(6, 4), classes=classes)
    target = make_soft(problem) if soft else make_target(problem, ignored=0.2, ignore_index=-7)
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        **({} if soft else {"ignore_index": -7}),
    }
    given = {**make_weights(problem, weights), "alpha": (1.5, -0.5)}
    if masked:
        given["present"] = make_present(problem)
        zero_absent(problem, given["present"])
    parts, grads = two_pass_loss(problem, target, **given, **options)
    found = results(problem, target, backend, **given, **options)
    assert_same({name: found[name] for name in (*parts, *grads)}, {**parts, **grads}, 1e-11)

    logits = flat(
        problem.call(dgl_ext.fused_decouple, present=given.get("present"), backend="reference")
    )
    counts = torch.ones(5, 13, dtype=torch.bool) if soft else target != -7
    label = target.argmax(-1) if soft else target
    masks = [
        torch.ones_like(counts),
        *(given["present"] if masked else [torch.ones_like(counts)] * 2),
    ]
    rows = (65, classes) if soft else (65,)
    for k, (z, mask) in enumerate(zip(logits, masks, strict=True)):
        each = F.cross_entropy(
            z.reshape(65, classes), target.reshape(rows), weight=given.get("class_weight"),
            **{**options, "reduction": "none"},
        ).reshape(5, 13)  # fmt: skip
        assert_same({"losses": found["losses"][k]}, {"losses": each.masked_fill(~mask, 0)}, 1e-11)
        assert torch.equal(found["predictions"][k], z.argmax(-1))
        assert found["count"][k] == (mask & counts).sum()
        assert found["correct"][k] == (mask & counts & (z.argmax(-1) == label)).sum()


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@one_axis_at_a_time(
    weights=[ALL, ()], soft=[torch.float32, None, torch.bfloat16], label_smoothing=[0.1, 0.0]
)
def test_no_less_exact_than_the_same_dtype_composition(
    fusion, backend, dtype, weights, soft, label_smoothing
):
    problem = make_problem(fusion, leading=(64,), widths=(96, 64), classes=70, dtype=dtype)
    target = make_target(problem, ignored=0.1) if soft is None else make_soft(problem, dtype=soft)
    options = {
        "encoder_leak": 0.5, "head_leak": 0.25, "label_smoothing": label_smoothing,
        "present": make_present(problem, share=0.8), **make_weights(problem, weights),
    }  # fmt: skip
    runs = [
        results(of, target, by, 65536.0, **options)
        for of, by in ((problem, backend), (problem, "reference"),
                       (problem.to(torch.float64), "reference"))
    ]  # fmt: skip
    for name in ("correct", "count", "predictions"):  # near ties may fall either way
        first, second, _ = (run.pop(name) for run in runs)
        assert (first != second).float().mean() < 0.1
    assert_no_less_exact(*runs, dtype, roundings=2)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("case", ["a rare modality", "alpha", "class weights of soft targets"])
def test_float16_holds_what_is_large_until_it_is_divided(fusion, backend, case):
    """By the number of rows, mostly; and an upstream gradient that makes up for alpha."""
    large = dict.fromkeys(("encoder_leak", "head_leak"), 1.0)
    upstream = 1.0
    problem = make_problem(fusion, leading=(4096 if "rare" in case else 8,), dtype=torch.float16)
    target = make_target(problem)
    if case == "a rare modality":
        large |= {"alpha": 40.0, "present": [None, torch.arange(4096) == 7]}
    elif case == "alpha":
        large["alpha"], upstream = 1e5, 1e-3
    else:
        target, large = make_soft(problem), {"class_weight": torch.tensor([1e5, 2e5, 5e4])}
        upstream = 0.1
    runs = [
        results(of, target, by, upstream, **large)
        for of, by in ((problem, backend), (problem, "reference"),
                       (problem.to(torch.float64), "reference"))
    ]  # fmt: skip
    assert_no_less_exact(*runs, torch.float16, roundings=2)
    assert all(value.isfinite().all() for value in runs[0].values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_soft_targets_of_every_dtype_and_layout(backend, dtype, layout):
    problem = make_problem("concat", leading=(9,), classes=11, dtype=torch.float32)
    drawn = random_tensor((9, 11), torch.Generator().manual_seed(1), dtype=dtype, layout=layout)
    found = results(problem, drawn.abs(), backend)
    expected = results(problem, drawn.abs().to(torch.float32).contiguous(), "reference")
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32],
    ids=str,
)
def test_class_indices_of_every_integer_dtype(backend, dtype):
    problem = make_problem("sum", leading=(9,), classes=11)
    target = make_target(problem, ignored=0.3, ignore_index=100)
    wide = results(problem, target, backend, ignore_index=100)
    assert_same(results(problem, target.to(dtype), backend, ignore_index=100), wide, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [0, 2, 255])
def test_soft_targets_have_no_row_to_ignore(fusion, backend, ignore_index):
    problem = make_problem(fusion)
    target = make_soft(problem)
    expected = results(problem, target, backend)
    assert_same(results(problem, target, backend, ignore_index=ignore_index), expected, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_weights_of_every_dtype(backend, dtype):
    problem = make_problem("concat", leading=(9,), classes=11)
    target = make_target(problem)
    weights = {name: w.round().to(dtype) for name, w in make_weights(problem).items()}
    wide = {name: w.double() for name, w in weights.items()}
    found, expected = (results(problem, target, backend, **w) for w in (weights, wide))
    assert_same(found, expected, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True])
def test_ones_are_no_weights(fusion, backend, soft):
    problem = make_problem(fusion, leading=(9,), classes=5)
    target = make_soft(problem) if soft else make_target(problem, ignored=0.3)
    ones = {"class_weight": torch.ones(5), "sample_weight": torch.ones(9)}
    options = {"present": make_present(problem), "label_smoothing": 0.1, "backend": backend}
    found = results(problem, target, **options, **ones)
    assert_same(found, results(problem, target, **options), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*ALL, "smoothed"])
def test_no_weight_at_all_is_a_mean_of_nan_without_gradients(fusion, backend, name):
    problem = make_problem(fusion)
    target = make_target(problem)
    options = {name: torch.zeros(3 if name == "class_weight" else 7)}
    if name == "smoothed":  # losses are not zero, but what they are divided by
        target = torch.ones_like(target)
        options = {"class_weight": torch.tensor([1, 0, 1]), "label_smoothing": 0.1}
    found = results(problem, target, backend, **options)
    assert all(value.isnan() for name, value in found.items() if value.dim() == 0)
    assert (found["count"] == 7).all()
    assert not any(found[tensor].any() for tensor, _ in problem.named())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_a_modality_whose_rows_have_no_weight_costs_nothing(fusion, backend, name):
    problem = make_problem(fusion)
    present = [torch.arange(7) < 2, None]
    target = make_target(problem)
    options = {"sample_weight": (torch.arange(7) >= 2).double()}
    if name == "class_weight":  # with smoothing its rows have losses
        target = torch.tensor([1, 1, 0, 2, 0, 2, 0])
        options = {"class_weight": torch.tensor([1, 0, 1]), "label_smoothing": 0.1}
    found = results(problem, target, backend, present=present, **options)
    assert found["unimodal[0]"] == 0
    assert found["total"].isfinite()
    assert not found["features[0]"].any()
    assert found["features[1]"][2:].any()


def test_probabilities_of_the_right_class(fusion):
    """What OGM-GE and curricula weigh by."""
    problem = make_problem(fusion)
    target = make_target(problem)
    loss = problem.step(dgl_ext.fused_decouple_cross_entropy, target)
    for k, z in enumerate(flat(problem.call(dgl_ext.fused_decouple))):
        right = z.softmax(-1).gather(1, target[:, None])[:, 0]
        assert torch.allclose((-loss.losses[k]).exp(), right)
    assert not any(t.requires_grad for t in (loss.losses, loss.predictions, loss.count))


@pytest.mark.parametrize("soft", [False, True])
def test_compiled_and_under_autocast(fusion, soft):
    problem = make_problem(fusion, dtype=torch.float32)
    target = make_soft(problem) if soft else make_target(problem, ignored=0.2)
    weights = make_weights(problem)

    def call():
        return problem.step(dgl_ext.fused_decouple_cross_entropy, target, **weights)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            pair = [
                {**loss._asdict(), **loss_gradients(loss, problem)} for loss in (compiled(), call())
            ]
        for found in pair:
            found |= {f"unimodal {i}": value for i, value in enumerate(found.pop("unimodal"))}
        assert_same(*pair, 1e-6)
        assert pair[0]["losses"].dtype == torch.float32


def test_modules_take_the_same(fusion):
    module = dgl_ext.nn.MODULES[fusion]((5, 4), 3)
    features, target = (torch.randn(7, 5), torch.randn(7, 4)), torch.rand(7, 3)
    weights = {"class_weight": torch.rand(3), "sample_weight": torch.rand(7)}
    found = module.cross_entropy(*features, target=target, **weights)
    hooked = dgl_ext.nn.MODULES[fusion]((5, 4), 3)
    hooked.load_state_dict(module.state_dict())
    for layer in hooked._layers():
        layer.register_forward_hook(lambda *_: None)  # then layers are called as they are
    expected = hooked.cross_entropy(*features, target=target, **weights)
    for a, b in zip((*found[:2], *found[3:]), (*expected[:2], *expected[3:]), strict=True):
        assert torch.allclose(a, b)


PEAK = """
import resource, sys, torch, dgl_ext
rows, classes, soft = 4096, 8192, sys.argv[1] == "soft"
features = [torch.randn(rows, 16, requires_grad=True) for _ in range(2)]
weight = torch.randn(classes, 32, requires_grad=True)
target = torch.rand(rows, classes) if soft else torch.randint(classes, (rows,))
weights = {"class_weight": torch.rand(classes), "sample_weight": torch.rand(rows)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dgl_ext.fused_decouple_cross_entropy(features, weight, target, **weights).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.gate
def test_soft_targets_add_nothing_of_their_size():
    """They take 128 MiB; the step keeps to its workspace of 64 MiB as with class indices."""
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", PEAK, kind], text=True))
        for kind in ("soft", "indices")
    ]
    assert peaks[0] < peaks[1] + 32, peaks
    assert peaks[1] < 150, peaks

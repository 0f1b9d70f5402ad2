"""Random problems against float64: shapes, layouts, dtypes, leaks, subsets, in any combination.

`--hypothesis-profile=long` draws 100,000 of them.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import (
    LAYOUTS,
    assert_same,
    assert_within_rounding,
    cotangents_like,
    flat,
    gradients,
    loss_gradients,
    make_present,
    make_problem,
    make_target,
)
from support.two_pass import named_logits

import dgl_ext
from dgl_ext._arguments.heads import HEADS

SIZES = st.one_of(st.integers(0, 9), st.sampled_from([16, 31, 64, 65, 100]))
LEAKS = st.sampled_from([0.0, 0.0, 0.25, 1.0])


@st.composite
def problems(draw):
    fusion = draw(st.sampled_from(list(HEADS)))
    count = draw(st.sampled_from(list(HEADS[fusion].modalities)))
    widths = draw(st.lists(SIZES, min_size=count, max_size=count))
    biases = len(HEADS[fusion].weight_shapes(widths))
    problem = make_problem(
        fusion,
        leading=draw(st.lists(st.integers(0, 9), max_size=3)),
        widths=widths,
        classes=draw(SIZES),
        bias=draw(st.lists(st.booleans(), min_size=biases, max_size=biases)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**32)),
    )
    for _, tensor in problem.named():
        tensor.requires_grad_(draw(st.integers(0, 3)) > 0)
    return problem


@given(
    problem=problems(),
    leaks=st.fixed_dictionaries({"encoder_leak": LEAKS, "head_leak": LEAKS}),
    used=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    layout=st.sampled_from(LAYOUTS),
)
def test_no_random_problem_is_wrong(problem, leaks, used, layout):
    def results(given_problem, backend, cotangents):
        logits = given_problem.call(dgl_ext.fused_decouple, backend=backend, **leaks)
        grads = [
            g.to(z.dtype) if use else None
            for g, z, use in zip(cotangents, flat(logits), used, strict=False)
        ]
        return {**named_logits(logits), **gradients(logits, given_problem, grads)}

    logits = problem.call(dgl_ext.fused_decouple, backend="reference")
    cotangents = cotangents_like(logits, layout=layout)
    actual = results(problem, "fused", cotangents)
    exact = problem.to(torch.float64)
    truth = results(exact, "reference", cotangents)
    if problem.features[0].dtype == torch.float64:
        assert_same(actual, truth)
        return
    # The formulas are sums of products, so on absolute values they give the sums of absolute terms.
    absolute = results(exact.map(torch.abs), "reference", [g.abs() for g in cotangents])
    rows = truth["fused"][..., :1].numel()
    widths = sum(h.shape[-1] for h in problem.features)
    terms = rows + 2 * widths + truth["fused"].shape[-1] + 16
    assert_within_rounding(actual, truth, absolute, terms)


ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


@given(
    problem=problems().filter(lambda problem: problem.weights[-1].shape[0] > 0),
    options=st.fixed_dictionaries(
        {
            "encoder_leak": LEAKS,
            "head_leak": LEAKS,
            "alpha": st.sampled_from([1.0, 0.0, -0.5, 2.0]),
            "reduction": st.sampled_from(["mean", "sum"]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        }
    ),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.booleans(),
    upstream=st.sampled_from([1.0, 3.0]),
    limit=st.sampled_from([None, 1, 4096]),
)
def test_no_random_step_is_wrong(problem, options, ignored, masked, upstream, limit):
    target = make_target(problem, ignored=ignored)
    present = make_present(problem) if masked else None

    def results(given_problem, backend):
        loss = given_problem.step(
            dgl_ext.fused_decouple_cross_entropy,
            target,
            present=present,
            backend=backend,
            **options,
        )
        parts = dict(enumerate((loss.total, loss.fused, *loss.unimodal)))
        return {**parts, **loss_gradients(loss, given_problem, upstream)}

    dgl_ext.set_workspace_limit(limit)
    try:
        actual = results(problem, "fused")
    finally:
        dgl_ext.set_workspace_limit(None)
    truth = results(problem.to(torch.float64), "reference")
    assert_same(actual, truth, ROUNDING[problem.features[0].dtype])

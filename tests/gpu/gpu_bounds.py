"""How far float32 rounding may take the logits and gradients of a head, whatever the order of sums.

Each sum of n products is off by at most n + 2 unit roundoffs of the sum of their absolute values
(`emulator/bounded.py`), and what comes in with an error carries it on through the products that
follow. Sums are taken to be as long as any executor makes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from emulator.bounded import Bounded, add, concatenate, matmul
from support.problems import Problem, assert_same_names
from torch import Tensor

ROUNDED = "float32"


def exact(tensor: Tensor) -> Bounded:
    return Bounded(tensor.detach().double().numpy())


def expected(
    problem: Problem, cotangents: Sequence[Tensor], encoder_leak: float, head_leak: float
) -> dict[str, Bounded]:
    """Logits and gradients of a two-dimensional problem with all biases, by name."""
    g = [exact(cotangent) for cotangent in cotangents]
    features, weights, biases = (
        [exact(tensor) for tensor in group]
        for group in (problem.features, problem.weights, problem.biases)
    )
    if problem.fusion == "film":
        results = _film(g, features, weights, biases, encoder_leak, head_leak)
    else:
        results = _linear(problem.fusion, g, features, weights, biases, encoder_leak, head_leak)
    return {name: value.rounded(ROUNDED) for name, value in results.items()}


def _linear(fusion, g, features, weights, biases, encoder_leak, head_leak) -> dict[str, Bounded]:
    every = concatenate(features, 1)
    if fusion == "concat":
        whole = weights[0]
        ends = np.cumsum([0, *(h.value.shape[1] for h in features)])
        weights = [whole[:, a:b] for a, b in itertools.pairwise(ends)]
        branch_biases = biases * len(features)
    else:
        whole, branch_biases = concatenate(weights, 1), biases
    fused, *unimodal = g
    mixed = [fused + r.scaled(head_leak) for r in unimodal]
    grads = [matmul(r.T, h) for r, h in zip(mixed, features, strict=True)]
    results = {"logits[0]": add([matmul(every, whole.T), *biases])}
    for i, (h, w, b) in enumerate(zip(features, weights, branch_biases, strict=True)):
        results[f"logits[{i + 1}]"] = matmul(h, w.T) + b
        results[f"features[{i}]"] = matmul(unimodal[i] + fused.scaled(encoder_leak), w)
    if fusion == "concat":
        shared = add([fused, *(r.scaled(head_leak) for r in unimodal)])
        return results | {"weight[0]": concatenate(grads, 1), "bias[0]": shared.sum_rows()}
    for i, (grad, r) in enumerate(zip(grads, mixed, strict=True)):
        results |= {f"weight[{i}]": grad, f"bias[{i}]": r.sum_rows()}
    return results


def _film(g, features, weights, biases, encoder_leak, head_leak) -> dict[str, Bounded]:
    (x, y), (film_weight, out_weight), (film_bias, out_bias) = features, weights, biases
    width = y.value.shape[1]

    def halves(both: Bounded) -> tuple[Bounded, Bounded]:
        return both[..., :width], both[..., width:]

    gamma, beta = halves(matmul(x, film_weight.T) + film_bias)
    b_gamma, b_beta = halves(film_bias)
    hidden = [gamma * y + beta, beta, b_gamma * y + b_beta]
    results = {f"logits[{k}]": matmul(h, out_weight.T) + out_bias for k, h in enumerate(hidden)}
    fused, only_x, only_y = (matmul(r, out_weight) for r in g)
    of_gamma, of_beta = fused * y, fused
    to_x = of_gamma.scaled(encoder_leak), of_beta.scaled(encoder_leak) + only_x
    to_head = of_gamma, of_beta + only_x.scaled(head_leak)
    of_biases = to_head[0] + (only_y * y).scaled(head_leak), to_head[1] + only_y.scaled(head_leak)
    head = [g[0], g[1].scaled(head_leak), g[2].scaled(head_leak)]
    return results | {
        "features[0]": matmul(concatenate(list(to_x), 1), film_weight),
        "features[1]": (fused * gamma).scaled(encoder_leak) + only_y * b_gamma,
        "weight[0]": matmul(concatenate(list(to_head), 1).T, x),
        "weight[1]": matmul(concatenate(head, 0).T, concatenate(hidden, 0)),
        "bias[0]": concatenate(list(of_biases), 1).sum_rows(),
        "bias[1]": concatenate(head, 0).sum_rows(),
    }


def assert_within(
    actual: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    bounds: Mapping[str, Bounded],
) -> None:
    """Asserts that no entry is further off than its bound; `truth` says that the bounds are of it.

    Raises:
        AssertionError: with the name of the first result that is.
    """
    assert_same_names(actual, truth)
    for name, value in truth.items():
        bound = bounds[name]
        value, found = value.double().numpy(), actual[name].double().numpy()
        size = np.abs(value).max(initial=1.0)
        np.testing.assert_allclose(bound.value, value, rtol=0, atol=1e-12 * size, err_msg=name)
        wrong = ~(np.abs(found - value) <= bound.error)  # NaN is wrong too
        if wrong.any():
            raise AssertionError(f"{name}: {wrong.sum()} entries are further off than rounding")

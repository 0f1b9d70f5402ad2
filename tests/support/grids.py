"""Grids of test cases that grow with the sum of their axes, not with the product."""

from __future__ import annotations

from typing import Any

import pytest


def one_axis_at_a_time(**axes: list[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test: one axis takes all its values, the others stay at their first.

    `test_fuzz.py` draws the combinations.
    """
    base = {name: values[0] for name, values in axes.items()}
    cases = [base] + [{**base, name: v} for name, values in axes.items() for v in values[1:]]
    return pytest.mark.parametrize(
        tuple(axes),
        [tuple(case.values()) for case in cases],
        ids=["-".join(map(str, case.values())) for case in cases],
    )


def mostly_slow(values: list[Any], quick: int) -> list[Any]:
    """The first few values as they are, the others as slow tests."""
    return values[:quick] + [pytest.param(v, marks=pytest.mark.slow) for v in values[quick:]]

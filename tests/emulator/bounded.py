"""Numbers with a proven bound on what a kernel may differ from them.

A `Bounded` is the exact result in float64 and, element by element, how far the kernel's rounding
may take it: products and sums round in the accumulator type, stores round to the storage type. No
tolerance is chosen by hand, and one wrong term in a sum of thousands shows.
"""

from __future__ import annotations

import numpy as np

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Half the spacing of subnormals: the error of rounding something tiny.
SUBNORMAL = {
    "float64": 2.0**-1075,
    "float32": 2.0**-150,
    "bfloat16": 2.0**-134,
    "float16": 2.0**-25,
}


class Bounded:
    """An array of exact values and an array of error bounds; arithmetic rounds in `accumulator`."""

    def __init__(self, value, error=0.0, accumulator: str = "float32"):
        self.value = np.asarray(value, dtype=np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)
        self.accumulator = accumulator

    def _result(self, value, error, roundings: float = 1.0) -> Bounded:
        unit = UNIT_ROUNDOFF[self.accumulator] * roundings * 1.01
        return Bounded(value, error + unit * (np.abs(value) + error), self.accumulator)

    def __add__(self, other: Bounded) -> Bounded:
        return self._result(self.value + other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = (
            np.abs(self.value) * other.error
            + self.error * np.abs(other.value)
            + self.error * other.error
        )
        return self._result(self.value * other.value, error)

    def scaled(self, factor: float) -> Bounded:
        """Times a number that the kernel keeps in the accumulator type: two roundings."""
        return self._result(self.value * factor, self.error * abs(factor), 2)

    def sum_rows(self) -> Bounded:
        roundings = UNIT_ROUNDOFF[self.accumulator] * (len(self.value) + 1)
        magnitude = (np.abs(self.value) + self.error).sum(0)
        return Bounded(
            self.value.sum(0), self.error.sum(0) + roundings * magnitude, self.accumulator
        )

    def rounded(self, dtype: str) -> Bounded:
        """After a store as `dtype`."""
        error = self.error + UNIT_ROUNDOFF[dtype] * 1.01 * (np.abs(self.value) + self.error)
        return Bounded(self.value, error + SUBNORMAL[dtype], self.accumulator)

    def without_rows(self, rows: np.ndarray) -> Bounded:
        """With exact zeros in `rows`, whatever was there."""
        value, error = self.value.copy(), np.array(self.error)
        value[rows] = 0
        error[rows] = 0
        return Bounded(value, error, self.accumulator)

    @property
    def T(self) -> Bounded:
        return Bounded(self.value.T, self.error.T, self.accumulator)

    def __getitem__(self, index) -> Bounded:
        return Bounded(self.value[index], self.error[index], self.accumulator)


def matmul(a: Bounded, b: Bounded, tf32: bool = False) -> Bounded:
    """a @ b in any order of summation; `tf32` first rounds both operands to 11 bits."""
    accumulator = a.accumulator
    if tf32:
        a, b = (Bounded(x.value, x.error + 2.0**-11 * np.abs(x.value), accumulator) for x in (a, b))
    size_a, size_b = np.abs(a.value), np.abs(b.value)
    error = size_a @ b.error + a.error @ size_b + a.error @ b.error
    roundings = UNIT_ROUNDOFF[accumulator] * (a.value.shape[1] + 2) * 1.01
    magnitude = (size_a + a.error) @ (size_b + b.error)
    return Bounded(a.value @ b.value, error + roundings * magnitude, accumulator)


def concatenate(parts: list[Bounded], axis: int) -> Bounded:
    return Bounded(
        np.concatenate([p.value for p in parts], axis),
        np.concatenate([p.error for p in parts], axis),
        parts[0].accumulator,
    )


def add(terms: list[Bounded | None]) -> Bounded | None:
    """Their sum; None stands for nothing, and is the sum of nothing."""
    terms = [t for t in terms if t is not None]
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

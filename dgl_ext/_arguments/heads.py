"""The heads there are, and what each one asks of its features and parameters.

This is the one list of fusion heads. The other tables (`reference.FORMULAS`, `nn.MODULES`) are
keyed by the names here and a test holds them equal, so that a new head is validated, computed and
tested by being registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .validate import (
    autocast_dtype,
    cast,
    check_choice,
    check_features,
    check_length,
    check_like,
    check_parameter,
    check_sequence,
    check_shape,
    plain_tuple,
)

MAX_MODALITIES = 8

Features = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]
Biases = tuple[Tensor | None, ...]
WeightShapes = list[tuple[int | None, int | None]]


@dataclass(frozen=True)
class Head:
    """A fusion head and the shapes of its parameters.

    Attributes:
        name: the value of `fusion`.
        op: what its dispatcher ops are called, before `_forward`, `_backward` and `_step`.
        modalities: the numbers of modalities that it takes.
        single_weight: whether `weight` and `bias` are tensors rather than sequences of tensors.
        weight_shapes: from the features' widths, the shape of each weight; `None` stands for C,
            the number of outputs. The bias of a weight `(out, in)` has shape `(out,)`.
    """

    name: str
    op: str
    modalities: range
    single_weight: bool
    weight_shapes: Callable[[list[int]], WeightShapes]

    def check(
        self, features: object, weight: object, bias: object
    ) -> tuple[Features, Weights, Biases]:
        """Returns the arguments as tuples of tensors, cast under autocast; raises unless they fit.

        There is one bias per weight, `None` where it is absent.
        """
        tensors = check_features(features)
        self.check_count("features", len(tensors), "tensors")
        dtype = autocast_dtype(tensors[0].device.type)
        if dtype is not None:
            tensors = tuple(cast(tensor, dtype) for tensor in tensors)
        like = tensors[0]
        for i in range(1, len(tensors)):
            check_like(f"features[{i}]", tensors[i], like)

        shapes = self.weight_shapes([tensor.shape[-1] for tensor in tensors])
        weights = self._sequence("weight", weight, len(shapes))
        biases = (
            (None,) * len(shapes) if bias is None else self._sequence("bias", bias, len(shapes))
        )
        classes: int | None = None  # as the first weight says whose rows are outputs
        checked_weights = []
        checked_biases: list[Tensor | None] = []
        for i, (rows, columns) in enumerate(shapes):
            index = "" if self.single_weight else f"[{i}]"
            expected = classes if rows is None else rows
            value = check_parameter(f"weight{index}", weights[i], dtype, like)
            check_shape(f"weight{index}", value, (expected, columns))
            checked_weights.append(value)
            if rows is None:
                expected = classes = value.shape[0]
            if biases[i] is None:
                checked_biases.append(None)
                continue
            value = check_parameter(f"bias{index}", biases[i], dtype, like)
            check_shape(f"bias{index}", value, (expected,))
            checked_biases.append(value)
        return tensors, tuple(checked_weights), tuple(checked_biases)

    def unpack_if_plain(
        self, features: object, weight: object, bias: object
    ) -> tuple[Features, Weights, Biases] | None:
        """Returns what `check` does where all fits, without a look into the tensors, or None.

        None says that only `check` can tell: it knows more kinds of sequences and of tensors.
        """
        tensors = plain_tuple(features)
        weights = plain_tuple((weight,) if self.single_weight else weight)
        if not tensors or weights is None:
            return None
        # One for each modality: a linear op takes a single weight for that of concat.
        if not self.single_weight and len(weights) != len(tensors):
            return None
        given = (None,) * len(weights) if bias is None else (bias,) if self.single_weight else bias
        biases = plain_tuple(given, or_none=True)
        if biases is None:
            return None
        return tensors, weights, biases

    def check_count(self, argument: str, count: int, what: str) -> None:
        """Raises unless the head takes `count` modalities."""
        if count not in self.modalities:
            low, high = self.modalities[0], self.modalities[-1]
            expected = str(low) if low == high else f"{low} to {high}"
            raise ValueError(
                f'{argument}: expected {expected} {what} for fusion="{self.name}", got {count}'
            )

    def _sequence(self, argument: str, value: object, length: int) -> tuple[object, ...]:
        if self.single_weight:
            return (value,)
        what = f'tensors for fusion="{self.name}"'
        values = check_sequence(argument, value, f"a sequence of {length} {what}")
        check_length(argument, values, length, f" {what}")
        return values


_ANY_MODALITIES = range(1, MAX_MODALITIES + 1)

HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("concat", "linear_head", _ANY_MODALITIES, True, lambda widths: [(None, sum(widths))]),
        Head(
            "sum",
            "linear_head",
            _ANY_MODALITIES,
            False,
            lambda widths: [(None, width) for width in widths],
        ),
        # The conditioner x makes gamma and beta, one each per column of the target y.
        Head(
            "film",
            "film_head",
            range(2, 3),
            False,
            lambda widths: [(2 * widths[1], widths[0]), (None, widths[1])],
        ),
    )
}


def get_head(fusion: object) -> Head:
    """Returns the head registered under the name `fusion`."""
    return HEADS[check_choice("fusion", fusion, HEADS)]

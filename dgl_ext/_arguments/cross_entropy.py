"""The loss of a training step: what `F.cross_entropy` takes, alpha and masks, all checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .heads import Features
from .validate import (
    check_alpha,
    check_ignore_index,
    check_present,
    check_reduction,
    check_share,
    check_target,
)


class CrossEntropy(NamedTuple):
    """Cross-entropy of every branch with one target.

    Attributes:
        target: class indices, int64, of the features' leading shape.
        alpha: what each unimodal loss is multiplied by in the total.
        mean: whether losses are averaged over the rows that count, or summed.
        ignore_index: the target of rows that do not count.
        label_smoothing: the share of the target that is spread over all classes.
        present: one mask (or None) per modality; empty where there are none.
    """

    target: Tensor
    alpha: tuple[float, ...]
    mean: bool
    ignore_index: int
    label_smoothing: float
    present: tuple[Tensor | None, ...]

    @classmethod
    def check(
        cls,
        features: Features,
        target: object,
        present: object,
        alpha: object = 1.0,
        reduction: object = "mean",
        ignore_index: object = -100,
        label_smoothing: object = 0.0,
    ) -> CrossEntropy:
        """Checks a user's arguments; each error names its own."""
        return cls(
            check_target(target, features[0]),
            *check_numbers(len(features), alpha, reduction, ignore_index, label_smoothing),
            check_present(present, features),
        )


def check_numbers(
    modalities: int,
    alpha: object,
    reduction: object,
    ignore_index: object,
    label_smoothing: object,
) -> tuple[tuple[float, ...], bool, int, float]:
    """Checks what a loss takes besides tensors, in the order of `CrossEntropy`."""
    return (
        check_alpha(alpha, modalities),
        check_reduction(reduction),
        check_ignore_index(ignore_index),
        check_share("label_smoothing", label_smoothing),
    )

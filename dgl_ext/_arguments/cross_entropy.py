"""The loss of a training step: what `F.cross_entropy` takes, weights, alpha and masks, checked."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Features
from .validate import (
    INDEX_DTYPES,
    check_alpha,
    check_choice,
    check_ignore_index,
    check_present,
    check_share,
    check_target,
    check_weight,
    loss_dtype,
    plain_tuple,
)


class LossNumbers(NamedTuple):
    """What a loss takes besides tensors.

    Attributes:
        alpha: what each unimodal loss is multiplied by in the total.
        mean: whether losses are averaged over the rows that count, or summed.
        ignore_index: the target of rows that do not count.
        label_smoothing: the share of the target that is spread over all classes.
    """

    alpha: tuple[float, ...]
    mean: bool
    ignore_index: int
    label_smoothing: float

    @classmethod
    def check(
        cls,
        modalities: int,
        alpha: object,
        reduction: object,
        ignore_index: object,
        label_smoothing: object,
    ) -> LossNumbers:
        """Checks a user's arguments; each error names its own."""
        return cls(
            check_alpha(alpha, modalities),
            check_choice("reduction", reduction, ("mean", "sum")) == "mean",
            check_ignore_index(ignore_index),
            check_share("label_smoothing", label_smoothing),
        )


class CrossEntropy(NamedTuple):
    """Cross-entropy of every branch with one target.

    Attributes:
        target: class indices, int64, of the features' leading shape, or soft targets `(..., C)`.
        class_weight: `(C,)`, in the loss's dtype, or None.
        sample_weight: of the leading shape, in the loss's dtype, or None.
        present: one mask (or None) per modality; empty where there are none.
    """

    target: Tensor
    class_weight: Tensor | None
    sample_weight: Tensor | None
    numbers: LossNumbers
    present: tuple[Tensor | None, ...]

    @classmethod
    def check(
        cls,
        features: Features,
        classes: int,
        target: object,
        present: object,
        alpha: object = 1.0,
        reduction: object = "mean",
        ignore_index: object = -100,
        label_smoothing: object = 0.0,
        class_weight: object = None,
        sample_weight: object = None,
    ) -> CrossEntropy:
        """Checks a user's arguments; each error names its own."""
        return cls(
            check_target(target, features[0], classes),
            check_weight("class_weight", class_weight, features[0], (classes,)),
            check_weight("sample_weight", sample_weight, features[0], features[0].shape[:-1]),
            LossNumbers.check(len(features), alpha, reduction, ignore_index, label_smoothing),
            check_present(present, features),
        )


# What has a default, which modules pass on.
LOSS_OPTIONS = frozenset(
    name
    for name, parameter in inspect.signature(CrossEntropy.check).parameters.items()
    if parameter.default is not parameter.empty
)


def unpack_if_plain(
    target: object, class_weight: object, sample_weight: object, like: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Returns target and weights as `CrossEntropy.check` does where they fit, or None.

    Shapes and devices are checked by the op; None says that only `check` can tell.
    """
    tensors = plain_tuple((target, class_weight, sample_weight), or_none=True)
    if tensors is None or target is None:
        return None
    first, *weights = tensors
    if first.dtype is not torch.int64:
        if first.dtype in INDEX_DTYPES:
            first = first.long()
        elif first.requires_grad:
            return None
    if class_weight is None and sample_weight is None:
        return first, None, None
    for weight in weights:
        if weight is not None and (weight.requires_grad or weight.dtype.is_complex):
            return None
    dtype = loss_dtype(like)
    return (first, *(None if weight is None else weight.to(dtype) for weight in weights))

"""Heads whose layers do more than hold a weight: adapters, hooks, quantised or sharded layers.

Such layers are called as they are, in plain PyTorch, with the method's cuts around the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch_private, reference
from .._arguments.cross_entropy import CrossEntropy
from .._arguments.validate import check_features, check_present, is_foreign
from ..types import DecoupledLogits, DecoupledLoss
from . import _cut

# Calls a layer by its name: wholly, or with its parameters cut off.
Call = Callable[[str, Tensor], Tensor]
# Takes the features, and what of them the fused logits may reach.
Formula = Callable[[Call, Call, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]


def plain_parameters(
    layers: Sequence[nn.Module],
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Returns all weights and biases if the layers compute what those say, and nothing else.

    Each is read once: a parametrization computes it every time, and may count how often.
    """
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for layer in layers:
        if (
            # A parametrized layer has it, too; of a scripted one it cannot be read.
            getattr(type(layer), "forward", None) is not nn.Linear.forward
            or "forward" in layer.__dict__
            or _torch_private.has_hooks(layer)
        ):
            return None
        weight: Any = layer.weight
        bias: Any = layer.bias
        if is_foreign(weight) or is_foreign(bias):
            return None
        weights.append(weight)
        biases.append(bias)
    return weights, biases


def concat(
    whole: Call, cut: Call, features: Sequence[Tensor], fed: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One layer on all features side by side; alone, a modality has zeros beside it."""
    fused = whole("linear", torch.cat(list(fed), dim=-1))
    unimodal = []
    for i in range(len(features)):
        alone = [h if i == j else torch.zeros_like(h) for j, h in enumerate(features)]
        unimodal.append(cut("linear", torch.cat(alone, dim=-1)))
    return fused, unimodal


def summed(
    whole: Call, cut: Call, features: Sequence[Tensor], fed: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One layer for each feature."""
    names = [f"linears.{i}" for i in range(len(features))]
    first, *others = [whole(name, h) for name, h in zip(names, fed, strict=True)]
    fused = sum(others, first)
    return fused, [cut(name, h) for name, h in zip(names, features, strict=True)]


def film(
    whole: Call, cut: Call, features: Sequence[Tensor], fed: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """X makes scale and shift of y; alone, x is the shift, and y is scaled by what x = 0 makes."""
    x, y = features
    gamma, beta = whole("film", fed[0]).chunk(2, dim=-1)
    fused = whole("out", gamma * fed[1] + beta)
    _, beta_of_x = cut("film", x).chunk(2, dim=-1)
    gamma, beta = cut("film", torch.zeros_like(x)).chunk(2, dim=-1)
    return fused, [cut("out", beta_of_x), cut("out", gamma * y + beta)]


def compute(
    head: nn.Module,
    formula: Formula,
    leaks: tuple[float, float],
    features: Sequence[Tensor],
    target: Tensor | None,
    present: Sequence[Tensor | None] | None,
    loss_options: Mapping[str, Any],
) -> DecoupledLogits | DecoupledLoss:
    """Computes a head's logits, or with a target its loss, through its layers."""
    tensors = check_features(features)
    masks = check_present(present, tensors)
    encoder_leak, head_leak = leaks

    def whole(name: str, value: Tensor) -> Tensor:
        # A layer may write to what it gets.
        return _checked(name, head.get_submodule(name)(value.clone()))

    def cut(name: str, value: Tensor) -> Tensor:
        layer = head.get_submodule(name)
        if isinstance(layer, torch.jit.ScriptModule):  # its parameters cannot be replaced
            raise TypeError(f"{name}: expected a layer that is not scripted")
        _cut.check_not_sharded(name, layer, "the head")
        with _cut.Passes(layer).begin(head_leak) as run:
            return _checked(name, run((value.clone(),), {}))

    inputs = reference.without_absent(tensors, masks)
    fed = [reference._leak(h, encoder_leak) for h in inputs]
    with _cut.exclusive(head):
        fused, unimodal = formula(whole, cut, inputs, fed)
    logits = DecoupledLogits(fused, tuple(unimodal))
    if target is None:
        return logits
    loss = CrossEntropy.check(tensors, fused.shape[-1], target, masks, **loss_options)
    return reference.cross_entropy(logits, loss)


def _checked(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected it to return a tensor, got {type(value).__name__}")
    return value

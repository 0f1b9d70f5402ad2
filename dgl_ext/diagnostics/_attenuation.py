"""How much the fusion attenuates the gradients of the encoders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments.validate import check_alpha, check_length, check_tensors, check_width
from ..nn.decoupled import Decoupled
from ..nn.heads import _Fusion
from ..types import DecoupledLogits
from ._routing import LossFunction, buffers_kept, named_losses, random_state_kept, wide_dtype

Head = nn.Module | Callable[..., DecoupledLogits]


class Attenuation(NamedTuple):
    """Gradients that reach the features, by two losses; one entry per modality, on the device.

    Attributes:
        fused_norm: `(M,)`, of the gradient that the multimodal loss would send without truncation.
        unimodal_norm: `(M,)`, of the gradient that the unimodal loss sends, alpha applied.
        ratio: `(M,)`, `fused_norm / unimodal_norm`; below 1 where the fusion attenuates.
        cosine: `(M,)`, of the angle between the two; NaN where one of them is zero.
    """

    fused_norm: Tensor
    unimodal_norm: Tensor
    ratio: Tensor
    cosine: Tensor


def attenuation(
    head: Head,
    features: Sequence[Tensor],
    loss_fn: LossFunction,
    *,
    alpha: float | Sequence[float] = 1.0,
    present: Sequence[Tensor | None] | None = None,
) -> Attenuation:
    r"""Compares what each feature would receive from the multimodal loss with what it does receive.

    With features `h_i`, outputs `z` and `z_i` of the head, and no truncation:

        fused_norm_i = |d l(z) / d h_i|        unimodal_norm_i = |alpha_i d l_i(z_i) / d h_i|

    Norms are those of the whole tensor. Everything stays on the device: there is no host sync, so a
    call costs about one forward and one backward pass of the head and can be made in training.

    It reads and does not disturb: gradients are taken at detached copies of the features, so that
    no `.grad` changes and no hook of a parameter runs; buffers of the head, those of
    parametrizations too, are written in copies only; the random state is put back (dropout in
    `Decoupled` draws masks of its own for this). Hooks on a `Decoupled` module's fusion do run.

    Args:
        head: a module of `dgl_ext.nn` (a `Decoupled` too), or a function called as
            `head(features, encoder_leak=1.0)` that returns `DecoupledLogits`, such as
            `functools.partial(dgl_ext.fused_decouple, weight=weight, bias=bias, fusion="film")`.
        features: one tensor per modality, as the head takes them. They need not require a
            gradient.
        loss_fn: as in `routing`: called as `loss_fn(head, features)`, returns M + 1 scalar losses
            by name, that of the fused output first, then one per modality. The `head` that it gets
            is called as `head(*features)` and returns `DecoupledLogits` without truncation.
        alpha: the factor of the unimodal losses in training, or one per modality.
        present: as the head takes it.

    Returns:
        `Attenuation(fused_norm, unimodal_norm, ratio, cosine)`, `(M,)` each, float64, in which no
        norm of lesser dtypes overflows.

    Raises:
        TypeError: an argument is of the wrong type, or `head` a module of another kind.
        ValueError: a count does not fit the features, or a loss is not a scalar.

    Source: Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning",
    ICCV 2025, arXiv 2507.10213, which explains weak encoders by this attenuation.

    Example:
        >>> head = dgl_ext.nn.ConcatFusion((32, 64), 5)
        >>> features, target = (torch.randn(8, 32), torch.randn(8, 64)), torch.randint(5, (8,))
        >>> def loss_fn(head, features):
        ...     out = head(*features)
        ...     losses = [torch.nn.functional.cross_entropy(z, target) for z in (out[0], *out[1])]
        ...     return dict(zip(("fused", "audio", "video"), losses))
        >>> found = attenuation(head, features, loss_fn, alpha=2.0)
        >>> found.ratio.shape
        torch.Size([2])
    """
    tensors = check_tensors(features)
    alphas = check_alpha(alpha, len(tensors))
    kept = buffers_kept(head) if isinstance(head, nn.Module) else contextlib.nullcontext()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept([tensors[0].device]),
        kept,
    ):
        # What inference mode has made can take part in no graph.
        plain = [h.clone() if h.is_inference() else h for h in tensors]
        leaves = tuple(h.detach().requires_grad_() for h in plain)
        losses = named_losses(loss_fn, lambda *given: _uncut(head, given, present), leaves)
        what = " losses, the fused output's and one per modality"
        check_length("loss_fn", losses, len(leaves) + 1, what)
        values = list(losses.values())
        # The outputs may share a graph.
        fused = _gradients(values[0], leaves)
        alone = [_gradients(values[i + 1], (h,))[0] for i, h in enumerate(leaves)]
    return _compare(fused, alone, alphas)


class AttenuationMonitor:
    """Calls `attenuation` at every k-th step of a training loop and keeps what it returns.

    Args:
        every: the number k of steps from one measurement to the next; the first step is measured.

    Attributes:
        history: pairs `(step, Attenuation)`, steps counted from 0. The tensors stay on the device
            (4 M numbers each); reading them is what waits for the device.

    Raises:
        TypeError: `every` is not an int.
        ValueError: `every` is less than 1.

    Example:
        >>> monitor = AttenuationMonitor(every=10)
        >>> head = dgl_ext.nn.SumFusion((32, 64), 5)
        >>> for step in range(20):
        ...     features, target = (torch.randn(8, 32), torch.randn(8, 64)), torch.randn(8, 5)
        ...     def loss_fn(head, features):
        ...         fused, unimodal = head(*features)
        ...         mse = torch.nn.functional.mse_loss
        ...         return {str(k): mse(z, target) for k, z in enumerate((fused, *unimodal))}
        ...     _ = monitor.step(head, features, loss_fn)
        >>> [step for step, _ in monitor.history]
        [0, 10]
    """

    def __init__(self, every: int = 1) -> None:
        self.every = check_width("every", every)
        self.history: list[tuple[int, Attenuation]] = []
        self._steps = 0

    def step(
        self,
        head: Head,
        features: Sequence[Tensor],
        loss_fn: LossFunction,
        *,
        alpha: float | Sequence[float] = 1.0,
        present: Sequence[Tensor | None] | None = None,
    ) -> Attenuation | None:
        """Counts a step, and measures if it is one to measure; takes what `attenuation` takes."""
        step, self._steps = self._steps, self._steps + 1
        if step % self.every:
            return None
        found = attenuation(head, features, loss_fn, alpha=alpha, present=present)
        self.history.append((step, found))
        return found


def _uncut(
    head: Head, leaves: tuple[Tensor, ...], present: Sequence[Tensor | None] | None
) -> DecoupledLogits:
    """The head's outputs with gradients to the features from all of them."""
    if isinstance(head, (Decoupled, _Fusion)):
        return head._probe(leaves, present)
    if isinstance(head, nn.Module) or not callable(head):
        raise TypeError(
            "head: expected a module of dgl_ext.nn or a function like dgl_ext.fused_decouple, "
            f"got {type(head).__name__}"
        )
    options: dict[str, Any] = {} if present is None else {"present": present}
    out = head(leaves, encoder_leak=1.0, **options)
    if not isinstance(out, DecoupledLogits):
        raise TypeError(f"head: expected it to return DecoupledLogits, got {type(out).__name__}")
    return out


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss; zeros where it does not depend on an input."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(h) for h in inputs)
    return torch.autograd.grad(
        loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _compare(
    fused: Sequence[Tensor], unimodal: Sequence[Tensor], alphas: Sequence[float]
) -> Attenuation:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.flatten().to(wide_dtype(tensor))

    pairs = [
        (wide(a), alpha * wide(b)) for a, b, alpha in zip(fused, unimodal, alphas, strict=True)
    ]
    fused_norm = torch.stack([torch.linalg.vector_norm(a) for a, _ in pairs])
    unimodal_norm = torch.stack([torch.linalg.vector_norm(b) for _, b in pairs])
    # Each divided by its norm first: the product of two small norms would underflow.
    cosine = torch.stack(
        [
            ((a / size_a) * (b / size_b)).sum()
            for (a, b), size_a, size_b in zip(pairs, fused_norm, unimodal_norm, strict=True)
        ]
    )
    return Attenuation(fused_norm, unimodal_norm, fused_norm / unimodal_norm, cosine)


def plot_attenuation(
    history: AttenuationMonitor | Sequence[tuple[int, Attenuation]],
    path_or_ax: str | os.PathLike[str] | Any,
    names: Sequence[str] | None = None,
) -> Any:
    """Draws what an `AttenuationMonitor` has recorded. Needs matplotlib.

    Args:
        history: a monitor, or its `history`.
        path_or_ax: where to write a figure of norms, ratios and cosines, in the format of the
            path's suffix; or matplotlib axes, which get the ratios.
        names: of the modalities, for the legend.

    Returns:
        The figure, or the axes that were passed in.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing in the history, or not one name per modality.
    """
    records = history.history if isinstance(history, AttenuationMonitor) else list(history)
    if not records:
        raise ValueError("history: expected at least one measurement, got none")
    steps = [step for step, _ in records]
    # By field, (M, steps): the one place that waits for the device.
    columns = zip(*(found for _, found in records), strict=True)
    curves = Attenuation(*(torch.stack(column, dim=1).cpu() for column in columns))
    count = len(curves.ratio)
    labels = [f"modality {i}" for i in range(count)] if names is None else list(names)
    check_length("names", labels, count, ", one per modality")

    def draw(axes: Any, values: Any, style: str, suffix: str = "") -> None:
        for i, label in enumerate(labels):
            axes.plot(steps, values[i].tolist(), style, color=f"C{i}", label=label + suffix)

    def draw_ratios(axes: Any) -> None:
        draw(axes, curves.ratio, "-")
        axes.set_yscale("log")
        axes.axhline(1.0, color="0.6", linewidth=0.8)
        axes.set(xlabel="step", ylabel="fused / unimodal gradient norm")
        axes.legend()

    if not isinstance(path_or_ax, (str, os.PathLike)):
        draw_ratios(path_or_ax)
        return path_or_ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_attenuation needs matplotlib: pip install matplotlib, or dgl_ext[bench]"
        ) from error
    # Not through pyplot: no backend is chosen and no figure stays open.
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    norms, ratios, cosines = figure.subplots(1, 3)
    draw(norms, curves.fused_norm, "-", ", fused")
    draw(norms, curves.unimodal_norm, "--", ", unimodal")
    norms.set_yscale("log")
    norms.set(xlabel="step", ylabel="gradient norm at the feature")
    norms.legend()
    draw_ratios(ratios)
    draw(cosines, curves.cosine, "-")
    cosines.set(xlabel="step", ylabel="cosine", ylim=(-1.05, 1.05))
    figure.savefig(path_or_ax)
    return figure

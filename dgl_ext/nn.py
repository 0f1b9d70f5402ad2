"""Fusion heads as modules: a drop-in for the head of a multimodal network.

Their parameters are those of `nn.Linear`, in its layout and with its names, so that a state dict of
a plain head loads: `ConcatFusion` is one linear layer, `SumFusion` holds one per modality in
`linears`, `FiLMFusion` holds `film` and `out`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._validate import check_sequence, check_share, check_width
from .decoupled import Decoupled as Decoupled
from .functional import check_backend, fused_decouple, fused_decouple_cross_entropy
from .heads import get_head
from .types import DecoupledLogits, DecoupledLoss

# To torch.fx a call is one node: what it does depends on what it gets.
torch.fx.wrap("fused_decouple")
torch.fx.wrap("fused_decouple_cross_entropy")


class _Fusion(nn.Module, abc.ABC):
    """What the heads share: sizes, options, and the call."""

    fusion: str

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        encoder_leak: float = 0.0,
        head_leak: float = 0.0,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = check_sequence("in_features", in_features, "a tuple of ints, one per modality")
        get_head(self.fusion).check_count("in_features", len(widths), "widths")
        self.in_features = tuple(
            check_width(f"in_features[{i}]", width) for i, width in enumerate(widths)
        )
        self.out_features = check_width("out_features", out_features)
        self.encoder_leak = check_share("encoder_leak", encoder_leak)
        self.head_leak = check_share("head_leak", head_leak)
        self.backend = check_backend(backend)
        self._make_parameters(bias, {"device": device, "dtype": dtype})

    @abc.abstractmethod
    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        """Makes the parameters and draws their initial values."""

    @abc.abstractmethod
    def _head_parameters(self) -> tuple[Any, Any]:
        """The `weight` and `bias` of `fused_decouple`."""

    def forward(
        self,
        *features: Tensor,
        target: Tensor | None = None,
        present: Sequence[Tensor | None] | None = None,
        **loss_options: Any,
    ) -> DecoupledLogits | DecoupledLoss:
        """Calls `dgl_ext.fused_decouple`, or with a target its training step.

        Args:
            *features: one tensor `(..., in_features[i])` per modality.
            target: None for the logits; for the loss class indices, as in `cross_entropy`.
            present: as in `dgl_ext.fused_decouple`.
            **loss_options: with a target, those of `cross_entropy`.

        Returns:
            Without a target `DecoupledLogits(fused, unimodal)`, `(..., out_features)` each; with
            one the `DecoupledLoss` of `dgl_ext.fused_decouple_cross_entropy`.

        Raises:
            TypeError: an option of the loss was given without a target.
            ValueError: the features are not as many, or as wide, as `in_features` says.
        """
        self._check_widths(features)
        weight, bias = self._head_parameters()
        options: dict[str, Any] = {
            "fusion": self.fusion,
            "present": present,
            "encoder_leak": self.encoder_leak,
            "head_leak": self.head_leak,
            "backend": self.backend,
        }
        if target is not None:
            return fused_decouple_cross_entropy(
                features, weight, target, bias=bias, **loss_options, **options
            )
        if loss_options:
            raise TypeError(f"{min(loss_options)}: expected only together with a target")
        return fused_decouple(features, weight, bias, **options)

    def cross_entropy(
        self,
        *features: Tensor,
        target: Tensor,
        alpha: float | Sequence[float] = 1.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        present: Sequence[Tensor | None] | None = None,
    ) -> DecoupledLoss:
        """Calls this module with a target, hooks included.

        Args:
            *features: one tensor `(..., in_features[i])` per modality.
            target: class indices, int64 of the leading shape.
            alpha: as in `dgl_ext.fused_decouple_cross_entropy`, like all that follow.
            reduction: "mean" or "sum".
            ignore_index: the target of rows that do not count.
            label_smoothing: share of the target that is spread over all classes.
            present: as in `dgl_ext.fused_decouple`.

        Returns:
            `DecoupledLoss(total, fused, unimodal, correct)`: call `backward()` on it.
        """
        if target is None:
            raise TypeError("target: expected an int64 tensor, got NoneType")
        loss: DecoupledLoss = self(
            *features,
            target=target,
            alpha=alpha,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            present=present,
        )
        return loss

    def _check_widths(self, features: Sequence[Tensor]) -> None:
        if len(features) != len(self.in_features):
            raise ValueError(
                f"features: expected {len(self.in_features)} tensors as in_features, "
                f"got {len(features)}"
            )
        for i, (feature, width) in enumerate(zip(features, self.in_features, strict=True)):
            # What is no tensor with a width is an error of the functions.
            if isinstance(feature, Tensor) and feature.dim() and feature.shape[-1] != width:
                raise ValueError(
                    f"features[{i}]: expected shape (..., {width}) as in_features, "
                    f"got {tuple(feature.shape)}"
                )

    def extra_repr(self) -> str:
        """Sizes, and the options that are not at their defaults."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        for name, default in (("encoder_leak", 0.0), ("head_leak", 0.0), ("backend", "auto")):
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return text


class ConcatFusion(_Fusion):
    """Concatenation fusion, `z = [h_1 | ... | h_M] W^T + b`, with disentangled gradients.

    Args:
        in_features: one width per modality.
        out_features: number of outputs C.
        bias: whether there is a bias, which all branches share.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
        backend: see `dgl_ext.fused_decouple`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: `(out_features, sum(in_features))`, as that of `nn.Linear`.
        bias: `(out_features,)` or None.

    Example:
        >>> fusion = dgl_ext.nn.ConcatFusion((512, 256), 10)
        >>> out = fusion(torch.randn(4, 512), torch.randn(4, 256))
        >>> out.fused.shape
        torch.Size([4, 10])
    """

    fusion = "concat"

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        width = sum(self.in_features)
        self.weight = nn.Parameter(torch.empty((self.out_features, width), **factory))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def extra_repr(self) -> str:
        """Sizes, whether there is a bias, and the options that are not at their defaults."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class SumFusion(_Fusion):
    """Sum fusion, `z = sum_i (h_i W_i^T + b_i)`, with disentangled gradients.

    Args:
        in_features: one width per modality.
        out_features: number of outputs C.
        bias: whether every modality has a bias.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
        backend: see `dgl_ext.fused_decouple`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        linears: one `nn.Linear(in_features[i], out_features)` per modality.

    Example:
        >>> fusion = dgl_ext.nn.SumFusion((512, 256), 10)
        >>> len(fusion(torch.randn(4, 512), torch.randn(4, 256)).unimodal)
        2
    """

    fusion = "sum"

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        # For the type checker: it takes the modules of a ModuleList for modules of any kind.
        self.linears: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            nn.Linear(width, self.out_features, bias, **factory) for width in self.in_features
        )

    def reset_parameters(self) -> None:
        """Draws the parameters as `nn.Linear` does."""
        for linear in self.linears:
            linear.reset_parameters()

    def _head_parameters(self) -> tuple[list[Tensor], list[Tensor | None]]:
        linears = list(self.linears)
        return [linear.weight for linear in linears], [linear.bias for linear in linears]


class FiLMFusion(_Fusion):
    """FiLM fusion with disentangled gradients: the first feature conditions the second.

    `z = (gamma * y + beta) W_o^T + b_o` with `[gamma | beta] = x W_f^T + b_f`.

    Args:
        in_features: `(D_x, D_y)`, the widths of the conditioner x and of the target y.
        out_features: number of outputs C.
        bias: whether `out` has a bias. `film` always has one: its first half, `b_gamma`, starts at
            1, so that y passes where x is absent; without it y alone would give no logits to
            learn from.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
        backend: see `dgl_ext.fused_decouple`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        film: `nn.Linear(D_x, 2 * D_y)`, which makes `[gamma | beta]`.
        out: `nn.Linear(D_y, out_features)`.

    Example:
        >>> fusion = dgl_ext.nn.FiLMFusion((512, 256), 10)
        >>> fusion.film.bias[:256].unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    fusion = "film"

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        condition, hidden = self.in_features
        self.film = nn.Linear(condition, 2 * hidden, **factory)
        self.out = nn.Linear(hidden, self.out_features, bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as `nn.Linear` does and sets `b_gamma` to 1."""
        self.film.reset_parameters()
        self.out.reset_parameters()
        with torch.no_grad():
            self.film.bias[: self.in_features[1]] = 1

    def _head_parameters(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [self.film.weight, self.out.weight], [self.film.bias, self.out.bias]


MODULES: dict[str, type[_Fusion]] = {
    module.fusion: module for module in (ConcatFusion, SumFusion, FiLMFusion)
}

"""Fusion heads as modules: a drop-in for the head of a multimodal network.

They are made of `nn.Linear`: `ConcatFusion` holds one as `linear`, and loads the state dict of a
plain head, too; `SumFusion` holds one per modality in `linears`, `FiLMFusion` holds `film` and
`out`. Where a layer is more than that (an adapter, a quantised or hooked one), it is called as it
is, and the head computed in plain PyTorch.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._arguments.cross_entropy import LOSS_OPTIONS
from .._arguments.heads import get_head
from .._arguments.modes import get_mode
from .._arguments.validate import check_length, check_sequence, check_width
from ..functional import check_backend, fused_decouple, fused_decouple_cross_entropy
from ..types import DecoupledLogits, DecoupledLoss
from . import _layers
from ._mode import HasMode

# To torch.fx a call is one node: what it does depends on what it gets.
torch.fx.wrap("fused_decouple")
torch.fx.wrap("fused_decouple_cross_entropy")


class _Fusion(HasMode, abc.ABC):
    """What the heads share: sizes, options, and the call."""

    fusion: str
    _formula: _layers.Formula

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        mode: str = "dgl",
        encoder_leak: float | None = None,
        head_leak: float | None = None,
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
        self._set_mode(mode, encoder_leak, head_leak)
        self.backend = check_backend(backend)
        self._make_layers(bias, {"device": device, "dtype": dtype})

    @abc.abstractmethod
    def _make_layers(self, bias: bool, factory: dict[str, Any]) -> None:
        """Makes the layers and draws their initial values."""

    @abc.abstractmethod
    def _layers(self) -> Sequence[nn.Linear]:
        """The layers in the order of the arguments of `fused_decouple`."""

    def reset_parameters(self) -> None:
        """Draws the parameters as `nn.Linear` does."""
        for layer in self._layers():
            layer.reset_parameters()

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
            TypeError: an option of the loss was given without a target, or is none of the loss.
            ValueError: the features are not as many, or as wide, as `in_features` says.
        """
        if target is None and loss_options:
            raise TypeError(f"{min(loss_options)}: expected only together with a target")
        if not loss_options.keys() <= LOSS_OPTIONS:
            raise TypeError(
                f"{min(loss_options.keys() - LOSS_OPTIONS)}: expected an option of the loss "
                f"({', '.join(sorted(LOSS_OPTIONS))}); what the head itself takes is set where it "
                "is made"
            )
        self._check_widths(features)
        return self._compute(self.encoder_leak, features, target, present, **loss_options)

    def _compute(
        self, encoder_leak: float, features: Any, target: Any, present: Any, **loss_options: Any
    ) -> DecoupledLogits | DecoupledLoss:
        if target is not None and loss_options.get("alpha") is None:
            loss_options["alpha"] = get_mode(self._mode).alpha
        layers = self._layers()
        parameters = _layers.plain_parameters(layers)
        if parameters is None:
            self._check_backend_for_layers()
            leaks = encoder_leak, self.head_leak
            formula = type(self)._formula
            return _layers.compute(self, formula, leaks, features, target, present, loss_options)
        weight: Any
        bias: Any
        weight, bias = parameters
        if get_head(self.fusion).single_weight:
            (weight,), (bias,) = weight, bias
        options: dict[str, Any] = {
            "fusion": self.fusion,
            "present": present,
            "encoder_leak": encoder_leak,
            "head_leak": self.head_leak,
            "backend": self.backend,
        }
        if target is None:
            return fused_decouple(features, weight, bias, **options)
        return fused_decouple_cross_entropy(
            features, weight, target, bias=bias, **loss_options, **options
        )

    def _probe(self, features: Sequence[Tensor], present: Any) -> DecoupledLogits:
        """All logits without truncation, for diagnostics."""
        return cast(DecoupledLogits, self._compute(1.0, features, None, present))

    def _check_backend_for_layers(self) -> None:
        if self.backend in ("auto", "reference"):
            return
        for name, layer in self.named_modules():
            if layer in self._layers() and _layers.plain_parameters([layer]) is None:
                raise ValueError(
                    f'backend: "{self.backend}" needs layers that are nn.Linear without hooks, got '
                    f'{type(layer).__name__} as {name}: use backend="reference" or "auto"'
                )

    def cross_entropy(
        self,
        *features: Tensor,
        target: Tensor,
        alpha: float | Sequence[float] | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        present: Sequence[Tensor | None] | None = None,
    ) -> DecoupledLoss:
        """Calls this module with a target, hooks included.

        Args:
            *features: one tensor `(..., in_features[i])` per modality.
            target: class indices of the leading shape, or soft targets `(..., out_features)`.
            alpha: as in `dgl_ext.fused_decouple_cross_entropy`, like all that follow.
            reduction: "mean" or "sum".
            ignore_index: the target of rows that do not count.
            label_smoothing: share of the target that is spread over all classes.
            class_weight: `(out_features,)`, of the rows of each class.
            sample_weight: of the leading shape, of each row.
            present: as in `dgl_ext.fused_decouple`.

        Returns:
            `DecoupledLoss`: call `backward()` on it.
        """
        if target is None:
            raise TypeError("target: expected a tensor of classes or probabilities, got NoneType")
        loss: DecoupledLoss = self(
            *features,
            target=target,
            alpha=alpha,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            sample_weight=sample_weight,
            present=present,
        )
        return loss

    def _check_widths(self, features: Sequence[Tensor]) -> None:
        check_length("features", features, len(self.in_features), " tensors as in_features")
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
        options = self._mode_repr()
        if self.backend != "auto":
            options.append(f"backend={self.backend!r}")
        return ", ".join([text, *options])


class ConcatFusion(_Fusion):
    """Concatenation fusion, `z = [h_1 | ... | h_M] W^T + b`, with disentangled gradients.

    Args:
        in_features: one width per modality.
        out_features: number of outputs C.
        bias: whether there is a bias, which all branches share.
        mode: "dgl"; "joint", where the fused loss alone trains all; or "joint+unimodal", where all
            losses train all. Sets the leaks, and alpha of the loss, where they are None.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
        backend: see `dgl_ext.fused_decouple`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        linear: `nn.Linear(sum(in_features), out_features)`, whose `weight` and `bias` can be read
            from the head, too.

    Example:
        >>> fusion = dgl_ext.nn.ConcatFusion((512, 256), 10)
        >>> out = fusion(torch.randn(4, 512), torch.randn(4, 256))
        >>> out.fused.shape
        torch.Size([4, 10])
    """

    fusion = "concat"
    _formula = staticmethod(_layers.concat)

    def _make_layers(self, bias: bool, factory: dict[str, Any]) -> None:
        self.linear = nn.Linear(sum(self.in_features), self.out_features, bias, **factory)
        self.register_load_state_dict_pre_hook(_take_plain_names)

    def _layers(self) -> Sequence[nn.Linear]:
        return (self.linear,)

    def __setattr__(self, name: str, value: Any) -> None:
        # `nn.Module` would register a parameter of its own; nor does it take the names that
        # `named_parameters` gives, by which a loop may want to set what it has got.
        leaf = name.removeprefix("linear.")
        if leaf in ("weight", "bias"):
            setattr(self.linear, leaf, value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """`(out_features, sum(in_features))`, that of `linear`."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """`(out_features,)` or None, that of `linear`."""
        return self.linear.bias


def _take_plain_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Lets a `ConcatFusion` load what a plain `nn.Linear` has saved, as it once saved itself."""
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state_dict:
            state_dict.setdefault(f"{prefix}linear.{name}", state_dict.pop(f"{prefix}{name}"))


class SumFusion(_Fusion):
    """Sum fusion, `z = sum_i (h_i W_i^T + b_i)`, with disentangled gradients.

    Args:
        in_features: one width per modality.
        out_features: number of outputs C.
        bias: whether every modality has a bias.
        mode, encoder_leak, head_leak, backend, device, dtype: as in `ConcatFusion`.

    Attributes:
        linears: one `nn.Linear(in_features[i], out_features)` per modality.

    Example:
        >>> fusion = dgl_ext.nn.SumFusion((512, 256), 10)
        >>> len(fusion(torch.randn(4, 512), torch.randn(4, 256)).unimodal)
        2
    """

    fusion = "sum"
    _formula = staticmethod(_layers.summed)

    def _make_layers(self, bias: bool, factory: dict[str, Any]) -> None:
        # For the type checker: it takes the modules of a ModuleList for modules of any kind.
        self.linears: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            nn.Linear(width, self.out_features, bias, **factory) for width in self.in_features
        )

    def _layers(self) -> Sequence[nn.Linear]:
        return list(self.linears)


class FiLMFusion(_Fusion):
    """FiLM fusion with disentangled gradients: the first feature conditions the second.

    `z = (gamma * y + beta) W_o^T + b_o` with `[gamma | beta] = x W_f^T + b_f`.

    Args:
        in_features: `(D_x, D_y)`, the widths of the conditioner x and of the target y.
        out_features: number of outputs C.
        bias: whether `out` has a bias. `film` always has one: its first half, `b_gamma`, starts at
            1, so that y passes where x is absent; without it y alone would give no logits to
            learn from.
        mode, encoder_leak, head_leak, backend, device, dtype: as in `ConcatFusion`.

    Attributes:
        film: `nn.Linear(D_x, 2 * D_y)`, which makes `[gamma | beta]`.
        out: `nn.Linear(D_y, out_features)`.

    Example:
        >>> fusion = dgl_ext.nn.FiLMFusion((512, 256), 10)
        >>> fusion.film.bias[:256].unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    fusion = "film"
    _formula = staticmethod(_layers.film)

    def _make_layers(self, bias: bool, factory: dict[str, Any]) -> None:
        condition, hidden = self.in_features
        self.film = nn.Linear(condition, 2 * hidden, **factory)
        self.out = nn.Linear(hidden, self.out_features, bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as `nn.Linear` does and sets `b_gamma` to 1."""
        super().reset_parameters()
        with torch.no_grad():
            self.film.bias[: self.in_features[1]] = 1

    def _layers(self) -> Sequence[nn.Linear]:
        return self.film, self.out


MODULES: dict[str, type[_Fusion]] = {
    module.fusion: module for module in (ConcatFusion, SumFusion, FiLMFusion)
}

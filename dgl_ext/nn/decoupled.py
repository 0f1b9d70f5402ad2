"""Disentangled gradients for any fusion module, by calling it once per branch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _torch_private
from .._arguments.validate import (
    check_length,
    check_masks,
    check_sequence,
    check_tensor,
    check_tensors,
)
from ..reference import _leak, extended, without_absent
from ..types import DecoupledLogits
from ._cut import Passes, check_not_sharded, exclusive
from ._mode import HasMode

Substitute = Callable[[tuple[Tensor, ...], int], Sequence[Tensor]]


class Decoupled(HasMode):
    r"""Any fusion module with disentangled gradients: one call, one ordinary backward.

    With features `h_i`, M of them, a module `f` with parameters `w`, and `sg` for "no gradient
    from here on":

        z   = f(sg(h_1), ..., sg(h_M); w)                  multimodal truncation
        z_i = f(s_1, ..., h_i at slot i, ..., s_M; sg(w))  unimodal truncation

    where `s_j` stands in for a modality that is absent, as `substitute` says. Which gradient
    reaches which input, for any loss on the outputs:

    - a feature `h_i` receives that of its own `z_i`, never that of `z` or of another `z_j`;
    - the parameters of `f` receive that of `z`, never that of a `z_i`;
    - an input whose outputs no loss uses receives `None`, as if it were detached.

    That costs M + 1 calls of `f`. For concatenation, sum and FiLM in front of a linear layer the
    other modules here do the same in one op.

    What the calls share, and what not:

    - Order: the fused pass, then modality 1 to M. The mode (training or evaluation) is the
      module's own in all of them, and hooks on it and its submodules run in each.
    - Dropout draws a mask of its own in every pass. The losses are added, so each expected
      gradient depends on one pass alone and a mask in common would change nothing but the noise.
      The fused pass draws first: its output is what `f` alone gives from the same random state.
    - Buffers (running statistics of batch norm, `num_batches_tracked`, ...): all passes start from
      the same values, and only the fused pass writes: the others run on copies. Statistics of zeros
      never reach evaluation. In training mode batch norm normalises every pass by that pass's own
      batch, as it would if the passes were calls of `f`.
    - Attributes that `f` or a part of it sets on itself (attention maps, an auxiliary loss): as
      with buffers, the fused pass's stay and the others' are undone, except under `torch.compile`.
    - A parameter that `f` shares with an encoder is cut where `f` uses it, not where the encoder
      does. Tied parameters and parts under several names are one within `f`, too. Within
      `torch.nn.utils.parametrize.cached()` the unimodal passes compute weights of their own.
    - Every pass has copies of the features and keyword arguments: `f` may write to them in place.
    - Calls from several threads take turns. Do not train with `decoupled.fusion` itself in one
      thread while another calls the `Decoupled` module.

    What cannot be cut: a tensor that `f` reaches without it being a parameter or buffer of `f`,
    and activation checkpointing inside `f`, which recomputes with the true parameters: with
    `use_reentrant=False` backward raises, with `use_reentrant=True` unimodal gradients reach
    the parameters. Checkpoint the call of the `Decoupled` module instead.
    `dgl_ext.diagnostics.routing` shows which loss reaches what.

    `DistributedDataParallel` goes around the whole model, not around `fusion`: the fused pass uses
    every parameter once, as `f` alone would. `fully_shard` takes the `Decoupled` module as a unit,
    or something around it, not `fusion` or a part of that.

    The state dict is that of `fusion`, each key with the prefix `fusion.`; to load that of a
    plain module call `decoupled.fusion.load_state_dict`. For a fused prediction without the
    unimodal outputs call `decoupled.fusion(*features)`.

    Args:
        fusion: a module called as `fusion(*features)`; `Cat` makes one of layers that take one
            tensor. It returns a tensor of any shape, or any other structure of tensors, which then
            is what each output is. If its forward has a parameter `present` it is told in each pass
            what is absent, see `forward`.
        substitute: what stands in for absent modalities in a unimodal pass:

            - "zero": zeros.
            - "self": the modality's own feature in every slot, which needs equal shapes. The
              gradients of all slots add up.
            - a function called as `substitute(features, i)` that returns the M features of the pass
              of modality i. It must return `features[i]` in slot i. Where another slot is that
              same tensor it counts as "self"; everything else that it returns is detached, so that
              neither other features nor parameters of its own receive a gradient. A module becomes
              a submodule: freeze its parameters, or train them elsewhere.
        mode: "dgl"; "joint", where the gradient of the fused output reaches the features, too; or
            "joint+unimodal", plain autograd of all outputs. Sets the leaks where they are None.
        encoder_leak: the share, 0 to 1, of the fused output's gradient that the features receive
            on top of their own.
        head_leak: the share, 0 to 1, of the unimodal outputs' gradients that the parameters
            receive on top of that of the fused one.

    Raises:
        TypeError: `fusion` is no module, or a scripted one, or another argument's type is wrong.
        ValueError: `substitute`, `mode` or a leak is none of the values above, or `fusion` has lazy
            parameters, which do not exist before its first call.

    Source: Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning",
    ICCV 2025, arXiv 2507.10213, which zero-fills absent modalities ("zero"), and in its published
    code pairs a bilinear head's feature with itself ("self").

    Example:
        >>> class Late(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp = torch.nn.Sequential(
        ...             torch.nn.Linear(96, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
        ...         )
        ...
        ...     def forward(self, audio, video):
        ...         return self.mlp(torch.cat([audio, video], dim=-1))
        >>> head = Decoupled(Late())
        >>> audio = torch.randn(8, 32, requires_grad=True)
        >>> out = head(audio, torch.randn(8, 64))
        >>> out.fused.shape, len(out.unimodal)
        (torch.Size([8, 5]), 2)
        >>> out.fused.square().mean().backward()
        >>> audio.grad is None, head.fusion.mlp[0].weight.grad is None
        (True, False)
    """

    def __init__(
        self,
        fusion: nn.Module,
        substitute: Literal["zero", "self"] | Substitute = "zero",
        *,
        mode: str = "dgl",
        encoder_leak: float | None = None,
        head_leak: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(fusion, nn.Module) or isinstance(fusion, torch.jit.ScriptModule):
            raise TypeError(
                f"fusion: expected a torch.nn.Module, not scripted, got {type(fusion).__name__}"
            )
        for name, tensor in (*fusion.named_parameters(), *fusion.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(
                    f'fusion: expected a module without lazy parameters, got "{name}", which has '
                    "no shape yet; call the module once before"
                )
        if substitute not in ("zero", "self") and not callable(substitute):
            raise ValueError(
                f'substitute: expected "zero", "self" or a function, got {substitute!r}'
            )
        self.fusion = fusion
        self.substitute = substitute
        self._set_mode(mode, encoder_leak, head_leak)

    def forward(
        self,
        *features: Tensor,
        present: Sequence[Tensor | None] | None = None,
        **kwargs: Any,
    ) -> DecoupledLogits:
        """Calls `fusion` once with all features and once per modality with that one alone.

        Args:
            *features: one tensor per modality, of any shapes that `fusion` takes.
            present: per modality a bool tensor, or None for "everywhere". Its shape is that of the
                feature's first dimensions: `(batch,)`, or `(batch, tokens)`. Where it is False the
                feature counts as zero, is not read, and gets a gradient of exactly zero.
            **kwargs: handed to every pass. A tensor among them, also within lists, tuples and
                dicts, counts as a parameter of `fusion`: it receives the gradient of the fused
                output only.

        If the forward of `fusion` has a parameter `present`, each pass gives it a tuple of bool
        tensors there, one per modality, of the feature's shape without the last dimension: False
        where the feature is absent, be it by the argument `present` or, in a unimodal pass, since
        it is another modality's, whatever stands in for it. (A mask of all dimensions stays one.)
        So attention can leave tokens out, which zeros do not. Rows with nothing present occur.

        Returns:
            `DecoupledLogits(fused, unimodal)`: what `fusion` returns, and a tuple of M of those.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: there is no feature, a mask or a substitute does not fit the features, or
                `fusion` is sharded by itself.
        """
        shares = self.encoder_leak, self.head_leak
        return self._outputs(features, present, kwargs, *shares, trace=True)

    def _probe(
        self,
        features: Sequence[Tensor],
        present: Sequence[Tensor | None] | None,
        **kwargs: Any,
    ) -> DecoupledLogits:
        """All outputs without truncation, for diagnostics; no buffer is written."""
        return self._outputs(features, present, kwargs, 1.0, 1.0, trace=False)

    def _outputs(
        self,
        features: Sequence[Tensor],
        present: object,
        kwargs: dict[str, Any],
        encoder_share: float,
        head_share: float,
        trace: bool,
    ) -> DecoupledLogits:
        """Runs all passes; the fused one leaves its trace in the module if it may."""
        inputs, masks = self._check(features, present)
        asks = _takes_present(self.fusion)

        def keywords(share: float, alone: int | None = None) -> dict[str, Any]:
            values = {name: _copied(value, share) for name, value in kwargs.items()}
            if asks:
                values["present"] = _masks(inputs, masks, alone)
            return values

        with exclusive(self.fusion):
            passes = Passes(self.fusion)
            if trace:
                fused = self.fusion(*_copied(inputs, encoder_share), **keywords(1.0))
            with passes.begin(head_share) as run:
                if not trace:
                    fused = run(_copied(inputs, encoder_share), keywords(1.0))
                alone = [
                    run(self._branch(inputs, i), keywords(head_share, i))
                    for i in range(len(inputs))
                ]
        return DecoupledLogits(fused, tuple(alone))

    def _branch(self, inputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        """The features of the pass of modality `i`, which it may write to."""
        own = inputs[i]
        if isinstance(self.substitute, str):
            if self.substitute == "self":
                return tuple(own.clone() for _ in inputs)
            return tuple(
                own.clone() if i == j else torch.zeros_like(h) for j, h in enumerate(inputs)
            )
        # Not under no_grad: autocast would keep the casts of a module's parameters made there, and
        # whoever uses that module next would get no gradient.
        slots = check_sequence(
            "substitute", self.substitute(inputs, i), "a sequence of tensors, one per modality"
        )
        check_length("substitute", slots, len(inputs), " features, one per modality")
        if slots[i] is not own:
            raise ValueError(
                f"substitute: expected features[{i}] itself in slot {i} of its own pass, "
                "got something else"
            )
        # Only the feature itself may pass gradients; a parameter returned as it is would, too.
        return tuple(
            (own if slot is own else check_tensor(f"substitute[{j}]", slot).detach()).clone()
            for j, slot in enumerate(slots)
        )

    def _check(
        self, features: Sequence[Tensor], present: object
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Returns features with absent rows as zeros, and masks; raises unless everything fits."""
        check_not_sharded("fusion", self.fusion, "the Decoupled module")
        inputs = check_tensors(features)
        if self.substitute == "self":
            for i, value in enumerate(inputs):
                if value.shape != inputs[0].shape:
                    raise ValueError(
                        f"features[{i}]: expected shape {tuple(inputs[0].shape)} as features[0] "
                        f'for substitute="self", got {tuple(value.shape)}'
                    )
        masks = check_masks(present, inputs)
        for i, (value, mask) in enumerate(zip(inputs, masks, strict=True)):
            if mask is not None and (not mask.dim() or mask.shape != value.shape[: mask.dim()]):
                raise ValueError(
                    f"present[{i}]: expected the first dimensions of features[{i}], which is "
                    f"{tuple(value.shape)}, got shape {tuple(mask.shape)}"
                )
        return without_absent(inputs, masks), masks

    def extra_repr(self) -> str:
        """The substitute, and the leaks that are open."""
        shown = isinstance(self.substitute, nn.Module)  # as a submodule
        options = [] if shown else [f"substitute={self.substitute!r}"]
        return ", ".join([*options, *self._mode_repr()])


def _copied(value: Any, share: float) -> Any:
    """Copies the tensors in a structure, to be written to; gradient passes with that share."""

    def copy(entry: Any) -> Any:
        if not isinstance(entry, Tensor):
            return entry
        differentiable = entry.is_floating_point() or entry.is_complex()
        return (_leak(entry, share) if differentiable else entry).clone()

    return _torch_private.tree_map(copy, value)


def _takes_present(fusion: nn.Module) -> bool:
    """Whether the module's forward has a parameter of the name `present`."""
    return "present" in inspect.signature(fusion.forward).parameters


def _masks(
    features: tuple[Tensor, ...], masks: tuple[Tensor | None, ...], alone: int | None
) -> tuple[Tensor, ...]:
    """Where each feature is present in a pass: as given, or that of one modality alone."""
    values = []
    for i, (feature, mask) in enumerate(zip(features, masks, strict=True)):
        whole = mask is not None and mask.dim() == feature.dim()
        shape = feature.shape if whole else feature.shape[:-1]
        value = torch.full(shape, alone in (None, i), dtype=torch.bool, device=feature.device)
        values.append(value if mask is None else value & extended(mask, len(shape)))
    return tuple(values)


class Cat(nn.Sequential):
    """Layers of one tensor as a fusion module: features are concatenated, then go through them.

        Cat(layer_1, ..., layer_n)(h_1, ..., h_M) = layer_n(... layer_1([h_1 | ... | h_M]))

    Its state dict is that of `nn.Sequential`.

    Args:
        *layers: modules of one argument; those of an `nn.Sequential` as `Cat(*sequential)`.
        dim: where the features are concatenated: -1 for widths, 1 for tokens `(B, T, D)`.

    Example:
        >>> mlp = dgl_ext.nn.Cat(torch.nn.Linear(96, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
        >>> head = dgl_ext.nn.Decoupled(mlp)
        >>> head(torch.randn(8, 32), torch.randn(8, 64)).fused.shape
        torch.Size([8, 5])
    """

    def __init__(self, *layers: nn.Module, dim: int = -1) -> None:
        super().__init__(*layers)
        self.dim = dim

    def forward(self, *features: Tensor) -> Any:
        """Calls the layers on the concatenated features."""
        return super().forward(torch.cat(features, dim=self.dim))

    def extra_repr(self) -> str:
        """The dimension, if it is not the last."""
        return "" if self.dim == -1 else f"dim={self.dim}"

"""Disentangled gradients for any fusion module, by calling it once per branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ._validate import check_sequence, check_share, check_tensor
from .reference import _leak
from .types import DecoupledLogits

Substitute = Callable[[tuple[Tensor, ...], int], Sequence[Tensor]]


class Decoupled(nn.Module):
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
    - A parameter that `f` shares with an encoder is cut where `f` uses it, not where the encoder
      does. Tied parameters within `f` stay tied.

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
        fusion: a module called as `fusion(*features)`. It returns a tensor of any shape, or any
            other structure of tensors, which then is what each output is.
        substitute: what stands in for absent modalities in a unimodal pass:

            - "zero": zeros.
            - "self": the modality's own feature in every slot, which needs equal shapes. The
              gradients of all slots add up.
            - a function called as `substitute(features, i)` that returns the M features of the pass
              of modality i. It must return `features[i]` in slot i. Where another slot is that
              same tensor it counts as "self"; everything else that it returns is detached, so that
              neither other features nor parameters of its own receive a gradient. A module becomes
              a submodule: freeze its parameters, or train them elsewhere.
        encoder_leak: the share, 0 to 1, of the fused output's gradient that the features receive
            on top of their own.
        head_leak: the share, 0 to 1, of the unimodal outputs' gradients that the parameters
            receive on top of that of the fused one. Both at 1 give plain autograd of all outputs.

    Raises:
        TypeError: `fusion` is no module, or a scripted one, or another argument's type is wrong.
        ValueError: `substitute` or a leak is none of the values above, or `fusion` has lazy
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
        encoder_leak: float = 0.0,
        head_leak: float = 0.0,
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
        self.encoder_leak = check_share("encoder_leak", encoder_leak)
        self.head_leak = check_share("head_leak", head_leak)

    def forward(
        self, *features: Tensor, present: Sequence[Tensor | None] | None = None
    ) -> DecoupledLogits:
        """Calls `fusion` once with all features and once per modality with that one alone.

        Args:
            *features: one tensor per modality, of any shapes that `fusion` takes.
            present: per modality a bool tensor, or None for "everywhere". Its shape is that of the
                feature's first dimensions: `(batch,)`, or `(batch, tokens)`. Where it is False the
                feature counts as zero, is not read, and gets a gradient of exactly zero.

        Returns:
            `DecoupledLogits(fused, unimodal)`: what `fusion` returns, and a tuple of M of those.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: there is no feature, a mask or a substitute does not fit the features, or
                `fusion` is sharded by itself.
        """
        inputs = self._check(features, present)
        before = [self._copied_buffers() for _ in inputs]
        fused = self.fusion(*(_leak(h, self.encoder_leak) for h in inputs))
        return DecoupledLogits(fused, self._alone(inputs, before, self.head_leak))

    def _probe(
        self, features: Sequence[Tensor], present: Sequence[Tensor | None] | None
    ) -> DecoupledLogits:
        """All outputs without truncation, for diagnostics; no buffer is written."""
        inputs = self._check(features, present)
        copies = [self._copied_buffers() for _ in range(len(inputs) + 1)]
        fused = functional_call(self.fusion, copies.pop(), inputs)
        return DecoupledLogits(fused, self._alone(inputs, copies, 1.0))

    def _alone(
        self, inputs: tuple[Tensor, ...], buffers: list[dict[str, Tensor]], share: float
    ) -> tuple[Any, ...]:
        """The output of each modality alone, with that share of gradient to the parameters."""
        parameters = self._leaked_parameters(share)
        # Tied tensors are listed once; functional_call replaces them under each of their names.
        return tuple(
            functional_call(self.fusion, {**parameters, **buffers[i]}, self._branch(inputs, i))
            for i in range(len(inputs))
        )

    def _leaked_parameters(self, share: float) -> dict[str, Tensor]:
        return {name: _leak(value, share) for name, value in self.fusion.named_parameters()}

    def _copied_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.fusion.named_buffers()}

    def _branch(self, inputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        """The features of the pass of modality `i`."""
        if isinstance(self.substitute, str):
            if self.substitute == "self":
                return (inputs[i],) * len(inputs)
            return tuple(h if i == j else torch.zeros_like(h) for j, h in enumerate(inputs))
        # Not under no_grad: autocast would keep the casts of a module's parameters made there, and
        # whoever uses that module next would get no gradient.
        slots = check_sequence(
            "substitute", self.substitute(inputs, i), "a sequence of tensors, one per modality"
        )
        if len(slots) != len(inputs):
            raise ValueError(
                f"substitute: expected {len(inputs)} features, one per modality, got {len(slots)}"
            )
        if slots[i] is not inputs[i]:
            raise ValueError(
                f"substitute: expected features[{i}] itself in slot {i} of its own pass, "
                "got something else"
            )
        # Only the feature itself may pass gradients; a parameter returned as it is would, too.
        return tuple(
            inputs[i] if slot is inputs[i] else check_tensor("substitute", j, slot).detach()
            for j, slot in enumerate(slots)
        )

    def _check(self, features: Sequence[Tensor], present: object) -> tuple[Tensor, ...]:
        """Returns the features with absent rows as zeros; raises unless everything fits."""
        self._check_not_sharded()
        if not features:
            raise ValueError("features: expected at least one tensor, got none")
        inputs = tuple(check_tensor("features", i, value) for i, value in enumerate(features))
        if self.substitute == "self":
            for i, value in enumerate(inputs):
                if value.shape != inputs[0].shape:
                    raise ValueError(
                        f"features[{i}]: expected shape {tuple(inputs[0].shape)} as features[0] "
                        f'for substitute="self", got {tuple(value.shape)}'
                    )
        if present is None:
            return inputs
        masks = check_sequence("present", present, "a sequence of bool tensors, one per modality")
        if len(masks) != len(inputs):
            raise ValueError(
                f"present: expected {len(inputs)} entries, one per modality, got {len(masks)}"
            )
        return tuple(
            value if mask is None else _masked(i, value, mask)
            for i, (value, mask) in enumerate(zip(inputs, masks, strict=True))
        )

    def _check_not_sharded(self) -> None:
        """Raises if FSDP gathers parameters inside `fusion`: it would bring back the true ones."""
        # Seen from here they are shards then, and else whole. Tensor parallel parameters are
        # shards, too, and fine. Importing FSDP takes seconds, so only where somebody uses it.
        if any(hasattr(value, "full_tensor") for value in self.fusion.parameters()):
            from torch.distributed.fsdp import FSDPModule

            for name, module in self.fusion.named_modules():
                if isinstance(module, FSDPModule):
                    part = f'"{name}", a part of it' if name else "it"
                    raise ValueError(
                        f"fusion: expected no sharding within, but fully_shard was called on "
                        f"{part}; call it on the Decoupled module"
                    )

    def extra_repr(self) -> str:
        """The substitute, and the leaks that are open."""
        text = f"substitute={self.substitute!r}"
        if isinstance(self.substitute, nn.Module):
            text = ""  # shown as a submodule
        for name in ("encoder_leak", "head_leak"):
            if getattr(self, name) != 0:
                text += f"{', ' if text else ''}{name}={getattr(self, name)!r}"
        return text


def _masked(index: int, feature: Tensor, mask: object) -> Tensor:
    """Selects, does not multiply: what an absent row stores is never read, NaN included."""
    name = f"present[{index}]"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}")
    if mask.device != feature.device:
        raise ValueError(f"{name}: expected device {feature.device}, got {mask.device}")
    if mask.dim() == 0 or mask.shape != feature.shape[: mask.dim()]:
        raise ValueError(
            f"{name}: expected the first dimensions of features[{index}], which is "
            f"{tuple(feature.shape)}, got shape {tuple(mask.shape)}"
        )
    return torch.where(mask.reshape(mask.shape + (1,) * (feature.dim() - mask.dim())), feature, 0.0)

"""What the functions return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Gradients of one that `DecoupledLoss.backward` hands to autograd, by device and dtype.
_unit_gradients: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _unit_gradient(total: Tensor) -> Tensor:
    """Returns a one that nothing has written to, without a kernel where there is one already."""
    key = total.device, total.dtype
    one = _unit_gradients.get(key)
    if one is None or one._version != 0:  # a hook wrote to it
        with torch.inference_mode(False):
            one = torch.ones((), device=total.device, dtype=total.dtype)
        _unit_gradients[key] = one
    return one


def is_unit_gradient(gradient: Tensor) -> bool:
    """Whether `gradient` is known to be one, without a look at what it holds."""
    one = _unit_gradients.get((gradient.device, gradient.dtype))
    return gradient is one and one._version == 0


class DecoupledLogits(NamedTuple):
    """Logits of a fusion head with disentangled gradients.

    Attributes:
        fused: `(..., C)`, from all modalities. Its gradient trains the head.
        unimodal: one `(..., C)` per modality, from that modality alone. Its gradient trains that
            modality's encoder.
    """

    fused: Tensor
    unimodal: tuple[Tensor, ...]


class DecoupledLoss(NamedTuple):
    """Cross-entropy of a fusion head with disentangled gradients.

    Attributes:
        total: `fused + sum_i alpha_i * unimodal_i`, a scalar: call `backward()` on it, or on the
            whole, which saves two small kernels on CUDA.
        fused: the fused logits' loss, detached.
        unimodal: one loss per modality, detached, alpha not applied.
        correct: `(M + 1,)` int64, how many of the rows that count are top-1 hits, fused first.
    """

    total: Tensor
    fused: Tensor
    unimodal: tuple[Tensor, ...]
    correct: Tensor

    def backward(
        self,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Computes gradients as `total.backward()` does, and on CUDA with nothing but the step.

        The training step has made all gradients already. `total.backward()` has autograd fill a
        tensor with one and the step multiply by it; here the step knows that it is one. With
        float16 features the gradients are still rounded to float16.

        Args:
            retain_graph: as in `torch.Tensor.backward`.
            create_graph: as in `torch.Tensor.backward`.
            inputs: as in `torch.Tensor.backward`.

        Example:
            >>> h, weight = torch.randn(8, 32, requires_grad=True), torch.randn(5, 32)
            >>> target = torch.randint(5, (8,))
            >>> dgl_ext.fused_decouple_cross_entropy((h,), weight, target).backward()
            >>> h.grad.shape
            torch.Size([8, 32])
        """
        self.total.backward(_unit_gradient(self.total), retain_graph, create_graph, inputs)

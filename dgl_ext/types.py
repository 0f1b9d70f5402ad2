"""What the functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecoupledLogits(NamedTuple):
    """Logits of a fusion head with disentangled gradients.

    Attributes:
        fused: `(..., C)`, from all modalities. Its gradient trains the head.
        unimodal: one `(..., C)` per modality, from that modality alone. Its gradient trains that
            modality's encoder.
    """

    fused: Tensor
    unimodal: tuple[Tensor, ...]

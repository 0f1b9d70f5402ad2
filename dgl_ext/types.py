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


class DecoupledLoss(NamedTuple):
    """Cross-entropy of a fusion head with disentangled gradients.

    Attributes:
        total: `fused + sum_i alpha_i * unimodal_i`, a scalar: call `backward()` on it.
        fused: the fused logits' loss, detached.
        unimodal: one loss per modality, detached, alpha not applied.
        correct: `(M + 1,)` int64, how many of the rows that count are top-1 hits, fused first.
    """

    total: Tensor
    fused: Tensor
    unimodal: tuple[Tensor, ...]
    correct: Tensor

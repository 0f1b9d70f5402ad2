"""One small convolutional encoder per modality, and the network around a fusion head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgl_ext.nn import MODULES
from dgl_ext.types import DecoupledLogits

from .data import CLASSES

MODALITIES = ("image", "audio")
WIDTH = 64  # of every feature


def conv(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Sequential:
    """A 3 x 3 convolution, BatchNorm if asked for, and ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride, padding=1)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU())


def image_encoder(batch_norm: bool) -> nn.Sequential:
    """(N, 1, 8, 8) to (N, WIDTH)."""
    return nn.Sequential(
        conv(1, 16, 1, batch_norm),
        conv(16, 32, 2, batch_norm),
        conv(32, WIDTH, 2, batch_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def audio_encoder(batch_norm: bool) -> nn.Sequential:
    """(N, 1, 32, 51) to (N, WIDTH)."""
    return nn.Sequential(
        conv(1, 8, 2, batch_norm),
        conv(8, 16, 2, batch_norm),
        conv(16, 32, 2, batch_norm),
        nn.AdaptiveAvgPool2d((4, 2)),  # what is high or low, early or late, stays apart
        nn.Flatten(),
        nn.Linear(32 * 8, WIDTH),
        nn.ReLU(),
    )


ENCODERS = {"image": image_encoder, "audio": audio_encoder}


class Network(nn.Module):
    """Encoders of the given modalities and a fusion head of `dgl_ext`.

    Args:
        modalities: of `MODALITIES`, in that order.
        fusion: "concat", "sum" or "film".
        seed: of the initial weights. An encoder starts the same in every network of a seed.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
        batch_norm: whether the encoders have BatchNorm.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        fusion: str,
        seed: int,
        encoder_leak: float,
        head_leak: float,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        for modality in modalities:
            torch.manual_seed(1000 * seed + MODALITIES.index(modality))
            self.encoders[modality] = ENCODERS[modality](batch_norm)
        torch.manual_seed(1000 * seed + len(MODALITIES))
        self.head = MODULES[fusion](
            [WIDTH] * len(self.encoders),
            CLASSES,
            encoder_leak=encoder_leak,
            head_leak=head_leak,
        )

    def features(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One feature (N, WIDTH) per modality that the network has."""
        by_name = dict(zip(MODALITIES, inputs, strict=True))
        return [encoder(by_name[name]) for name, encoder in self.encoders.items()]

    def forward(self, inputs: Sequence[Tensor]) -> DecoupledLogits:
        """Fused and unimodal logits.

        Args:
            inputs: of all modalities, in the order of `MODALITIES`.

        Returns:
            What the head returns.
        """
        out: DecoupledLogits = self.head(*self.features(inputs))
        return out

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


def conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


def image_encoder() -> nn.Sequential:
    """(N, 1, 8, 8) to (N, WIDTH)."""
    return nn.Sequential(conv(1, 16, 1), conv(16, 32, 2), conv(32, WIDTH, 2), *pool())


def audio_encoder() -> nn.Sequential:
    """(N, 1, 32, 51) to (N, WIDTH)."""
    return nn.Sequential(conv(1, 16, 2), conv(16, 32, 2), conv(32, 32, 2), nn.AdaptiveAvgPool2d((4,2)), nn.Flatten(), nn.Linear(256,WIDTH), nn.ReLU())


def pool() -> tuple[nn.Module, nn.Module]:
    """Mean over all positions."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


ENCODERS = {"image": image_encoder, "audio": audio_encoder}


class Network(nn.Module):
    """Encoders of the given modalities and a fusion head of `dgl_ext`.

    Args:
        modalities: of `MODALITIES`, in that order.
        fusion: "concat", "sum" or "film".
        seed: of the initial weights. An encoder starts the same in every network of a seed.
        encoder_leak: see `dgl_ext.fused_decouple`.
        head_leak: see `dgl_ext.fused_decouple`.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        fusion: str,
        seed: int,
        encoder_leak: float,
        head_leak: float,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        for modality in modalities:
            torch.manual_seed(1000 * seed + MODALITIES.index(modality))
            self.encoders[modality] = ENCODERS[modality]()
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
        return self.head(*self.features(inputs))

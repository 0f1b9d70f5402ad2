"""Two ResNet-18 encoders (He et al. 2016) and a fusion head of dgl_ext."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dgl_ext.nn import MODULES
from dgl_ext.types import DecoupledLoss

from . import vision
from .data import EMOTIONS

MODALITIES = ("audio", "video")
STAGES = (2, 2, 2, 2)  # blocks each


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them.

    Modules are called as in torchvision, so that its state dicts load.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 without its classifier.

    Args:
        channels: of the input.
        width: channels of the first stage, doubled in each of the three that follow.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for stage, blocks in enumerate(STAGES):
            outputs = width << stage
            layer = [BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2)]
            layer += [BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, 8 * width)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(len(STAGES)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.avgpool(x).flatten(1)


def resnet18(channels: int, width: int, library: str) -> nn.Module:
    """A ResNet-18 without its classifier, from torchvision or our own.

    Args:
        channels: of the input.
        width: channels of the first stage; 64 for torchvision.
        library: "torchvision" or "own".

    Returns:
        (N, channels, H, W) to (N, 8 * width).
    """
    if library == "own":
        return ResNet18(channels, width)
    vision.torchvision()
    from torchvision.models import resnet18 as torchvision_resnet18

    encoder = torchvision_resnet18(weights=None)
    if channels != 3:
        encoder.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.fc = nn.Identity()
    return encoder


class AudioVideoNet(nn.Module):
    """Encoders and head. `forward` returns the loss, so that DDP and autocast see all of it.

    Args:
        fusion: "concat", "sum" or "film"; with "film", sound conditions the frames.
        width: channels of the ResNets' first stage.
        library: "torchvision" or "own".
        alpha: of the unimodal losses.
        options: `encoder_leak` and others of the head.
    """

    def __init__(self, fusion: str, width: int, library: str, alpha: float, **options: Any) -> None:
        super().__init__()
        self.alpha = alpha
        self.audio = resnet18(1, width, library)
        self.video = resnet18(3, width, library)
        self.head = MODULES[fusion]((8 * width, 8 * width), len(EMOTIONS), **options)

    def features(self, spectrogram: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both modalities, `(B, 8 * width)` each.

        Args:
            spectrogram: `(B, 1, frequencies, time)`.
            frames: `(B, T, 3, H, W)`; each frame passes the encoder, their features are averaged.
        """
        batch, count = frames.shape[:2]
        video = self.video(frames.flatten(0, 1)).reshape(batch, count, -1).mean(1)
        return self.audio(spectrogram), video

    def forward(self, spectrogram: Tensor, frames: Tensor, target: Tensor) -> DecoupledLoss:
        """The loss, summed over the rows that count.

        Args:
            spectrogram: see `features`.
            frames: see `features`.
            target: `(B,)`; `IGNORED` where a row does not count.
        """
        features = self.features(spectrogram, frames)
        return self.head.cross_entropy(*features, target=target, alpha=self.alpha, reduction="sum")


METHODS: dict[str, dict[str, float]] = {
    "dgl": {"encoder_leak": 0.0, "head_leak": 0.0},
    "joint": {"encoder_leak": 1.0, "head_leak": 0.0},
    "regularised": {"encoder_leak": 1.0, "head_leak": 1.0},
}
# What published runs of DGL use is 2 to 5; joint training has no unimodal losses.
DEFAULT_ALPHA = {"dgl": 2.0, "joint": 0.0, "regularised": 1.0}

"""Frames of a clip to tensors: which ones, which crop, which numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import vision

# Of ImageNet, as usual for networks of this kind.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

SCALE = (0.08, 1.0)  # of a random crop's area, relative to the image
RATIO = (3 / 4, 4 / 3)  # of a random crop's width to its height

Box = tuple[int, int, int, int]  # left, upper, right, lower


def pick_frames(paths: Sequence[Path], count: int, random: bool) -> list[Path]:
    """Chooses `count` frames in order of time.

    Args:
        paths: all frames of a clip, in order.
        count: how many to take; where there are fewer, some are taken more than once.
        random: draw them from torch's generator instead of spreading them evenly.

    Returns:
        The paths.
    """
    if random and len(paths) >= count:
        rows = torch.randperm(len(paths))[:count].sort().values.tolist()
    else:  # the middles of `count` equal parts
        rows = [(2 * k + 1) * len(paths) // (2 * count) for k in range(count)]
    return [paths[row] for row in rows]


def random_crop(width: int, height: int) -> Box:
    """Draws the area and the aspect ratio of a crop, and where it lies (Szegedy et al. 2015)."""
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*SCALE).item()
        log_ratio = torch.empty(1).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item()
        w = round(math.sqrt(area * math.exp(log_ratio)))
        h = round(math.sqrt(area / math.exp(log_ratio)))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, ()))
            upper = int(torch.randint(height - h + 1, ()))
            return left, upper, left + w, upper + h
    # Such a crop hardly fits into this image: the largest central one of an allowed ratio.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _torchvision_crop(image: Image.Image) -> Box:
    vision.torchvision()
    from torchvision.transforms import RandomResizedCrop

    upper, left, height, width = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    return left, upper, left + width, upper + height


def load_frames(paths: Sequence[Path], size: int, augment: bool, library: str) -> Tensor:
    """Reads frames; one crop and one flip for all frames of the clip.

    Args:
        paths: of the frames.
        size: height and width of the result.
        augment: random crop and flip, drawn from torch's generator; otherwise the whole image.
        library: "torchvision" or "own", which draws the crop.

    Returns:
        `(len(paths), 3, size, size)`, normalised.
    """
    images = []
    for path in paths:
        with Image.open(path) as file:
            images.append(file.convert("RGB"))
    box, flip = None, False
    if augment:
        first = images[0]
        box = _torchvision_crop(first) if library == "torchvision" else random_crop(*first.size)
        flip = bool(torch.rand(()) < 0.5)
    return torch.stack([_to_tensor(image, size, box, flip) for image in images])


def _to_tensor(image: Image.Image, size: int, box: Box | None, flip: bool) -> Tensor:
    if box is not None:
        image = image.crop(box)
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    tensor = pixels.reshape(size, size, 3).permute(2, 0, 1).to(torch.float32) / 255
    if flip:
        tensor = tensor.flip(2)
    return (tensor - MEAN) / STD

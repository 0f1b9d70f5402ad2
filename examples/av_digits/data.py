"""Pairs of a handwritten and a spoken digit, with noise on both."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .features import log_mel
from .speech import CLIP, RATE, Bank, load_bank

CLASSES = 10
SPLITS = ("train", "test")


@dataclass(frozen=True)
class DataConfig:
    """Sizes and noise.

    Attributes:
        train_per_digit: training pairs of every digit.
        test_per_digit: test pairs of every digit.
        clips_per_digit: clips that are synthesised, per digit and split.
        image_noise: standard deviation of the noise on pixels, which lie in [0, 1].
        snr_db: lowest and highest signal-to-noise ratio of a clip, in dB.
        noise_slopes: lowest and highest exponent s of the noise's power spectrum f^-s.
    """

    train_per_digit: int = 100
    test_per_digit: int = 70
    clips_per_digit: int = 110
    image_noise: float = 0.35
    snr_db: tuple[float, float] = (0.0, 12.0)
    noise_slopes: tuple[float, float] = (0.0, 1.5)


@dataclass(frozen=True)
class Pairs:
    """One split: `images` (N, 1, 8, 8), `speech` (N, 1, bands, frames), `digits` (N,)."""

    images: Tensor
    speech: Tensor
    digits: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the encoders get, in the order of `models.MODALITIES`."""
        return self.images, self.speech


def coloured_noise(
    shape: tuple[int, int], slopes: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """Gaussian noise of power 1 with a power spectrum f^-s, one exponent per row."""
    spectrum = np.fft.rfft(draw.standard_normal(shape), axis=1)
    frequency = np.fft.rfftfreq(shape[1])
    frequency[0] = frequency[1]  # finite at 0 Hz
    noise = np.fft.irfft(spectrum * frequency ** (-slopes[:, None] / 2), shape[1], axis=1)
    return noise / np.sqrt(np.mean(noise**2, axis=1, keepdims=True))


def place_and_disturb(
    clips: np.ndarray, lengths: np.ndarray, config: DataConfig, draw: np.random.Generator
) -> np.ndarray:
    """Puts every clip at a random place of its window, at power 1, and adds noise.

    Args:
        clips: (N, CLIP) int16, zero past `lengths`.
        lengths: (N,) samples of each clip.
        config: the noise.
        draw: where the random numbers come from.

    Returns:
        (N, CLIP) float64.
    """
    waves = np.zeros(clips.shape)
    for wave, clip, length in zip(waves, clips, lengths, strict=True):
        spoken = clip[:length] / np.sqrt(np.mean(np.square(clip[:length], dtype=np.float64)))
        start = draw.integers(CLIP - length + 1)
        wave[start : start + length] = spoken
    snr_db = draw.uniform(*config.snr_db, size=(len(clips), 1))
    slopes = draw.uniform(*config.noise_slopes, size=len(clips))
    noise = coloured_noise(waves.shape, slopes, draw)
    return waves + noise * 10 ** (-snr_db / 20)


def pair_speech(bank: Bank, digits: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Row of the bank for every image: a clip of its digit; no clip is used twice."""
    rows = np.empty(len(digits), np.int64)
    for digit in range(CLASSES):
        mine = np.flatnonzero(digits == digit)
        rows[mine] = draw.permutation(np.flatnonzero(bank.digits == digit))[: len(mine)]
    return rows


def draw_images(config: DataConfig, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images in [0, 1] and their digits, per split; the seed decides who is in which."""
    data = load_digits()
    train, test = train_test_split(
        np.arange(len(data.target)),
        train_size=CLASSES * config.train_per_digit,
        test_size=CLASSES * config.test_per_digit,
        random_state=seed,
        stratify=data.target,
    )
    return {
        split: (data.images[rows] / 16, data.target[rows])
        for split, rows in zip(SPLITS, (train, test), strict=True)
    }


@functools.lru_cache(maxsize=2)
def load_pairs(config: DataConfig, seed: int, cache: Path) -> dict[str, Pairs]:
    """Both splits, standardised with the training split's mean and deviation.

    The seed decides the split of the images, the pairing and the noise. The noise on a pair is
    drawn once: every epoch, and every method, sees the same.

    Args:
        config: sizes and noise.
        seed: see above.
        cache: folder of the cached speech.

    Returns:
        A `Pairs` for "train" and one for "test".
    """
    pairs = {}
    moments: list[tuple[Tensor, Tensor]] = []
    for number, (split, (images, digits)) in enumerate(draw_images(config, seed).items()):
        draw = np.random.default_rng([seed, number])
        bank = load_bank(split, config.clips_per_digit, cache)
        rows = pair_speech(bank, digits, draw)
        noisy = images + config.image_noise * draw.standard_normal(images.shape)
        waves = place_and_disturb(bank.clips[rows], bank.lengths[rows], config, draw)
        image_tensor = torch.tensor(noisy, dtype=torch.float32)[:, None]
        speech_tensor = log_mel(torch.tensor(waves, dtype=torch.float32), RATE)[:, None]
        if not moments:  # the training split comes first
            # One mean and deviation for all pixels, and one per frequency band.
            moments = [
                (x.mean(dims, keepdim=True), x.std(dims, keepdim=True))
                for x, dims in ((image_tensor, (0, 1, 2, 3)), (speech_tensor, (0, 1, 3)))
            ]
        image_tensor, speech_tensor = (
            (x - mean) / deviation
            for x, (mean, deviation) in zip((image_tensor, speech_tensor), moments, strict=True)
        )
        pairs[split] = Pairs(image_tensor, speech_tensor, torch.tensor(digits))
    return pairs

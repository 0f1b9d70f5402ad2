"""Log-mel spectrograms."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WINDOW = 256  # samples: 32 ms at 8 kHz
HOP = 128
BANDS = 32
LOWEST = 80.0  # Hz
FLOOR = 1e-6  # added to the power, so that digital silence has a logarithm


def hz_to_mel(hz: Tensor) -> Tensor:
    """The mel scale, 2595 log10(1 + f / 700)."""
    return 2595 * torch.log10(1 + hz / 700)


def mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of `hz_to_mel`."""
    return 700 * (10 ** (mel / 2595) - 1)


def band_edges(rate: int) -> Tensor:
    """`BANDS + 2` frequencies in Hz, evenly spaced on the mel scale from `LOWEST` to `rate` / 2.

    Band b rises from edge b, peaks at edge b + 1 and falls to zero at edge b + 2.
    """
    low, high = hz_to_mel(torch.tensor([LOWEST, rate / 2], dtype=torch.float64))
    return mel_to_hz(torch.linspace(low, high, BANDS + 2, dtype=torch.float64))


@functools.cache
def mel_filters(rate: int) -> Tensor:
    """The triangular filters, (BANDS, WINDOW / 2 + 1), each with its peak at 1."""
    edges = band_edges(rate)
    bins = torch.linspace(0, rate / 2, WINDOW // 2 + 1, dtype=torch.float64)
    left, centre, right = (edges[i : BANDS + i, None] for i in range(3))
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(waves: Tensor, rate: int) -> Tensor:
    """Log-mel spectrogram of every row.

    Args:
        waves: (N, samples) float32.
        rate: sampling rate in Hz.

    Returns:
        (N, BANDS, 1 + samples // HOP): natural logarithm of the power in every band and frame.
    """
    spectrum = torch.stft(
        waves,
        WINDOW,
        HOP,
        window=torch.hann_window(WINDOW),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square()
    return torch.log(mel_filters(rate) @ power + FLOOR)

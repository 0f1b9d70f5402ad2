"""WAV files to log-spectrograms, with the standard library and torch alone."""

from __future__ import annotations

import math
import wave
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLE_RATE = 22_050
SECONDS = 3
FFT_SIZE = 512
HOP = 353  # 3 s make 188 columns
FLOOR = 1e-7  # added before the logarithm

_TAPS = 16  # zero crossings of the resampling filter on either side


def wav_samples(path: Path) -> int:
    """Number of samples that a file's header promises.

    Args:
        path: a WAV file.

    Raises:
        ValueError: it is not a WAV file that the standard library can read.
    """
    try:
        with wave.open(str(path), "rb") as file:
            return file.getnframes()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: expected a PCM WAV file: {error}") from error


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Reads a PCM WAV file.

    Args:
        path: the file; channels are averaged.

    Returns:
        The samples in [-1, 1), float32, and the sample rate.

    Raises:
        ValueError: it is not a PCM WAV file of 8, 16 or 32 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = bytearray(file.readframes(file.getnframes()))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: expected a PCM WAV file: {error}") from error
    if width not in (1, 2, 4):
        raise ValueError(f"{path}: expected samples of 8, 16 or 32 bits, got {8 * width}")
    if not data:
        return torch.zeros(0), rate
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    samples = torch.frombuffer(data, dtype=dtype).to(torch.float32)
    if width == 1:  # 8 bits are unsigned
        samples -= 128
    samples /= 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(1), rate


@lru_cache(maxsize=8)
def _filters(old: int, new: int) -> tuple[Tensor, int]:
    """One windowed-sinc filter per output phase: `(new, 1, taps)`, and the padding on the left.

    Output `k * new + p` lies at the time `k * old + p * old / new`, in input samples.
    """
    # Relative to the input's Nyquist rate, and a little below: no filter is infinitely steep.
    cutoff = min(1.0, new / old) * 0.97
    reach = math.ceil(_TAPS / cutoff)
    positions = torch.arange(-reach, old + reach, dtype=torch.float64)
    centres = torch.arange(new, dtype=torch.float64) * old / new
    distance = positions - centres[:, None]
    window = torch.cos(distance * (math.pi / 2 / reach)).square()
    taps = torch.where(distance.abs() < reach, cutoff * torch.sinc(cutoff * distance) * window, 0.0)
    return taps.to(torch.float32)[:, None], reach


def resample(samples: Tensor, old_rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Changes the sample rate with a windowed-sinc filter.

    Args:
        samples: `(n,)`.
        old_rate: of the samples, in Hz.
        new_rate: wanted.

    Returns:
        `(ceil(n * new_rate / old_rate),)`.
    """
    common = math.gcd(old_rate, new_rate)
    old, new = old_rate // common, new_rate // common
    if old == new:
        return samples
    filters, reach = _filters(old, new)
    blocks = -(-len(samples) // old)
    padded = F.pad(samples, (reach, reach + blocks * old - len(samples)))
    phases = F.conv1d(padded[None, None], filters, stride=old)[0]  # (new, blocks)
    return phases.T.reshape(-1)[: -(-len(samples) * new // old)]


def log_spectrogram(samples: Tensor) -> Tensor:
    """The log-magnitude spectrogram of exactly `SECONDS` seconds.

    Args:
        samples: `(n,)` at `SAMPLE_RATE`, n > 0; repeated as often as it takes, then cut.

    Returns:
        `(1, 257, 188)`: one channel, frequencies, time.
    """
    length = SECONDS * SAMPLE_RATE
    samples = samples.repeat(-(-length // len(samples)))[:length].clamp(-1, 1)
    spectrum = torch.stft(
        samples,
        FFT_SIZE,
        HOP,
        window=torch.hann_window(FFT_SIZE),
        pad_mode="constant",
        return_complex=True,
    )
    return torch.log(spectrum.abs() + FLOOR)[None]

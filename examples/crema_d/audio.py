"""WAV files to log-spectrograms."""

from __future__ import annotations

import math
from pathlib import Path

import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

SAMPLE_RATE = 22_050
SECONDS = 3
FFT_SIZE = 512
HOP = 353  # 3 s make 188 columns
FLOOR = 1e-7  # added before the logarithm


def wav_samples(path: Path) -> int:
    """Number of samples that a file's header promises.

    Args:
        path: a sound file.

    Raises:
        ValueError: it is not a sound file.
    """
    try:
        return int(soundfile.info(path).frames)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: expected a WAV file: {error}") from error


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Reads a sound file.

    Args:
        path: the file; channels are averaged.

    Returns:
        The samples in [-1, 1), float32, and the sample rate.

    Raises:
        ValueError: it is not a sound file.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: expected a WAV file: {error}") from error
    return torch.from_numpy(samples).mean(1), rate


def resample(samples: Tensor, old_rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """Changes the sample rate.

    Args:
        samples: `(n,)`.
        old_rate: of the samples, in Hz.
        new_rate: wanted.

    Returns:
        `(ceil(n * new_rate / old_rate),)`.
    """
    common = math.gcd(old_rate, new_rate)
    found = resample_poly(samples.numpy(), new_rate // common, old_rate // common)
    return torch.from_numpy(found).to(samples.dtype)


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

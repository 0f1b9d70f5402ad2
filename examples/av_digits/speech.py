"""Spoken digits from espeak-ng: voices of the two splits, synthesis, and the cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

RATE = 8000  # Hz
CLIP = 6400  # samples: 0.8 s
SILENCE = 0.02  # of a clip's peak: what is quieter at its ends is cut off

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ACCENTS = (
    "en-us",
    "en-gb",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)
# A variant of espeak-ng is a speaker: another vocal tract, another glottis. The splits share none,
# so that every voice of the test split is unseen. They share the accents: there are too few.
VARIANTS = {
    "train": ("m1", "m2", "m3", "m4", "m8", "f1", "f2", "f3", "croak", "klatt2", "whisper"),
    "test": ("m5", "m6", "m7", "f4", "f5", "klatt4", "whisperf"),
}
PITCH = (15, 85)  # espeak-ng's -p, 0 to 99
SPEED = (130, 220)  # espeak-ng's -s, words per minute
LOUDNESS = 100  # espeak-ng's -a; clips are brought to the same power later

INSTALL = "espeak-ng is not installed. On Debian or Ubuntu: sudo apt-get install espeak-ng"


class SpeechError(RuntimeError):
    """The speech that the example needs cannot be made here."""


@dataclass(frozen=True)
class Utterance:
    """What to say, and how."""

    digit: int
    accent: str
    variant: str
    pitch: int
    speed: int

    @property
    def voice(self) -> str:
        """The name that espeak-ng gives to an accent with a variant."""
        return f"{self.accent}+{self.variant}"


def plan(split: str, per_digit: int) -> list[Utterance]:
    """Draws `per_digit` utterances of every digit; always the same ones.

    Args:
        split: "train" or "test".
        per_digit: how many.

    Returns:
        The utterances, grouped by digit.
    """
    draw = random.Random(f"av_digits {split}")
    return [
        Utterance(
            digit=digit,
            accent=draw.choice(ACCENTS),
            variant=draw.choice(VARIANTS[split]),
            pitch=draw.randint(*PITCH),
            speed=draw.randint(*SPEED),
        )
        for digit in range(len(WORDS))
        for _ in range(per_digit)
    ]


def espeak_version() -> str:
    """The version of espeak-ng, as it prints it; `SpeechError` where there is none."""
    if shutil.which("espeak-ng") is None:
        raise SpeechError(INSTALL)
    return _espeak("--version").split("Data at")[0].strip()


def _espeak(*words: str) -> str:
    done = subprocess.run(["espeak-ng", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SpeechError(f"espeak-ng {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


def check_voices() -> None:
    """Raises `SpeechError` where a voice is missing: espeak-ng itself would say it in another."""
    listed = _espeak("--voices=en").lower().split() + _espeak("--voices=variant").split()
    wanted = [*ACCENTS, *(f"!v/{name}" for names in VARIANTS.values() for name in names)]
    missing = [name for name in wanted if name not in listed]
    if missing:
        raise SpeechError(f"this espeak-ng ({espeak_version()}) lacks the voices {missing}")


def say(utterance: Utterance) -> np.ndarray:
    """Synthesises one utterance.

    Returns:
        int16 samples at `RATE`, at most `CLIP` of them, without silence at the ends.
    """
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        options = {
            "-v": utterance.voice,
            "-p": str(utterance.pitch),
            "-s": str(utterance.speed),
            "-a": str(LOUDNESS),
            "-w": file.name,
        }
        words = [word for option in options.items() for word in option]
        _espeak(*words, WORDS[utterance.digit])
        with wave.open(file.name) as reader:
            rate = reader.getframerate()
            samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
    return trim(resample_poly(samples.astype(np.float64), RATE, rate))


def trim(samples: np.ndarray) -> np.ndarray:
    """Cuts silence off both ends, cuts to `CLIP` samples, and scales the peak to half of int16."""
    peak = np.abs(samples).max(initial=0)
    loud = np.flatnonzero(np.abs(samples) > SILENCE * peak)
    if len(loud) == 0:
        raise SpeechError("espeak-ng wrote a silent file")
    voiced = samples[loud[0] : loud[-1] + 1][:CLIP]
    return np.round(voiced * (16384 / peak)).astype(np.int16)


@dataclass(frozen=True)
class Bank:
    """The clips of one split: `clips` (N, CLIP) int16, zero past `lengths`; `digits` (N,)."""

    clips: np.ndarray
    lengths: np.ndarray
    digits: np.ndarray


def load_bank(split: str, per_digit: int, cache: Path) -> Bank:
    """The clips of a split: from the cache, or synthesised and put there.

    Args:
        split: "train" or "test".
        per_digit: clips of every digit.
        cache: folder of the cached files; made if it is not there.

    Returns:
        The clips in the order of `plan`.
    """
    utterances = plan(split, per_digit)
    recipe = [espeak_version(), RATE, CLIP, SILENCE, LOUDNESS, [asdict(u) for u in utterances]]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache / f"speech_{split}_{key}.npz"
    if not path.exists():
        check_voices()
        with ThreadPoolExecutor() as pool:  # threads: the work is done by espeak-ng's processes
            spoken = list(pool.map(say, utterances))
        clips = np.zeros((len(spoken), CLIP), np.int16)
        for clip, samples in zip(clips, spoken, strict=True):
            clip[: len(samples)] = samples
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an interrupted run leaves no half a file under the final name. The
        # number is for two processes that do this at the same time.
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(partial, clips=clips, lengths=[len(samples) for samples in spoken])
        partial.rename(path)
    with np.load(path) as stored:
        digits = np.array([utterance.digit for utterance in utterances])
        return Bank(stored["clips"], stored["lengths"], digits)

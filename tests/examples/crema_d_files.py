"""Writes a tiny data set in CREMA-D's folder format: sounds and colours that tell the emotion."""

from __future__ import annotations

import math
import random
import wave
from array import array
from pathlib import Path

from PIL import Image

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
SIZE = (40, 30)  # of the frames


def write_wav(path: Path, samples: list[float], rate: int = 16_000) -> None:
    """Writes mono 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(array("h", [round(32767 * s) for s in samples]).tobytes())


def tone(emotion: int, noise: random.Random, seconds: float = 0.4, rate: int = 16_000):
    """A tone whose pitch tells the emotion, with noise."""
    pitch = 300 * (1 + emotion)
    return [
        0.5 * math.sin(2 * math.pi * pitch * k / rate) + noise.uniform(-0.1, 0.1)
        for k in range(round(seconds * rate))
    ]


def write_frame(path: Path, emotion: int, noise: random.Random) -> None:
    """A plain image whose brightness tells the emotion, with noise."""
    level = 40 * emotion
    pixels = bytes(min(255, level + noise.randrange(40)) for _ in range(3 * SIZE[0] * SIZE[1]))
    Image.frombytes("RGB", SIZE, pixels).save(path)


def make_data(root: Path, speakers: int = 6, clips: int = 6, suffixes=(".jpg", ".png")) -> None:
    """Writes `clips` clips of each speaker; the emotions take turns."""
    noise = random.Random(0)
    (root / "AudioWAV").mkdir(parents=True)
    for speaker in range(speakers):
        for k in range(clips):
            emotion = k % len(EMOTIONS)
            name = f"{1001 + speaker}_S{k:02d}_{EMOTIONS[emotion]}_XX"
            write_wav(root / "AudioWAV" / f"{name}.wav", tone(emotion, noise))
            folder = root / "Image-01-FPS" / name
            folder.mkdir(parents=True)
            for second in range(2):
                suffix = suffixes[(speaker + second) % len(suffixes)]
                write_frame(folder / f"{second + 1:05d}{suffix}", emotion, noise)

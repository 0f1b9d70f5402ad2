"""CREMA-D on disk: which clips there are, how they are split, and what a training row is."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .audio import log_spectrogram, read_wav, resample, wav_samples
from .images import load_frames, pick_frames

AUDIO_FOLDER = "AudioWAV"
FRAMES_FOLDER = "Image-01-FPS"
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
IGNORED = -100  # the target of a row that must not count, as in F.cross_entropy

SPLITS = ("train", "val", "test")


class DataError(Exception):
    """The folder does not hold what it should; the text says what and where."""


@dataclass(frozen=True)
class Clip:
    """One utterance: its name, its files, its label."""

    name: str
    wav: Path
    frames: tuple[Path, ...]

    @property
    def speaker(self) -> str:
        """The first part of the name."""
        return self.name.split("_")[0]

    @property
    def label(self) -> int:
        """Index into `EMOTIONS`, from the third part of the name."""
        return EMOTIONS.index(self.name.split("_")[2])


class Found(NamedTuple):
    """The complete clips, by name, and why the others were left out."""

    clips: dict[str, Clip]
    left_out: dict[str, str]


def find_clips(root: Path) -> Found:
    """Lists the clips of a folder in the format of the README.

    Args:
        root: holds `AudioWAV/NAME.wav` and `Image-01-FPS/NAME/*.jpg` (or .jpeg, .png).

    Returns:
        The clips that have sound and frames, sorted by name, and the others.

    Raises:
        DataError: a folder is missing, or there is no complete clip.
    """
    for folder in (root, root / AUDIO_FOLDER, root / FRAMES_FOLDER):
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; examples/crema_d/README.md says how to get it"
            )
    clips, left_out = {}, {}
    for wav in sorted((root / AUDIO_FOLDER).glob("*.wav")):
        clip = Clip(wav.stem, wav, _frames(root / FRAMES_FOLDER / wav.stem))
        problem = _problem(clip)
        if problem:
            left_out[clip.name] = problem
        else:
            clips[clip.name] = clip
    if clips:
        return Found(clips, left_out)
    if not left_out:
        raise DataError(f"{root / AUDIO_FOLDER}: no .wav files")
    name, problem = next(iter(left_out.items()))
    raise DataError(f"{root}: none of {len(left_out)} clips is complete; {name}: {problem}")


def _frames(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES))


def _problem(clip: Clip) -> str:
    parts = clip.name.split("_")
    if len(parts) != 4 or parts[2] not in EMOTIONS:
        return f"the name is not SPEAKER_SENTENCE_EMOTION_LEVEL with one of {', '.join(EMOTIONS)}"
    if not clip.frames:
        return f"no frames in {FRAMES_FOLDER}/{clip.name}"
    try:
        return "" if wav_samples(clip.wav) else "no sound"
    except ValueError as error:
        return str(error)


def read_list(path: Path, found: Found) -> list[Clip]:
    """Reads a list of clips: lines `NAME` or `NAME,EMOTION`, as published splits have them.

    Args:
        path: the file.
        found: what `find_clips` returned; a listed clip that it left out is skipped.

    Raises:
        DataError: a line names an unknown clip or another emotion than its name, or a clip twice.
    """
    clips: dict[str, Clip] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    for name, *emotion in rows:
        if name in found.left_out:
            continue
        if name not in found.clips:
            raise DataError(f"{path}: no clip {name!r} in the data folder")
        clip = found.clips[name]
        if emotion and emotion[0] != EMOTIONS[clip.label]:
            raise DataError(f"{path}: {name} with emotion {emotion[0]!r}; its name says otherwise")
        if name in clips:
            raise DataError(f"{path}: {name} is there twice")
        clips[name] = clip
    if not clips:
        raise DataError(f"{path}: no clips")
    return list(clips.values())


def split_speakers(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Splits clips so that no speaker is on both sides.

    Args:
        clips: at least two speakers'.
        share: of the speakers that goes to the second part; at least one speaker does.
        seed: which ones.

    Returns:
        The two parts, each in the order of `clips`.

    Raises:
        DataError: there is only one speaker.
    """
    speakers = sorted({clip.speaker for clip in clips})
    if len(speakers) < 2:
        raise DataError(f"a split by speaker needs two speakers, got {', '.join(speakers)}")
    count = min(max(1, round(share * len(speakers))), len(speakers) - 1)
    held = set(random.Random(seed).sample(speakers, count))
    parts: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in clips:
        parts[clip.speaker in held].append(clip)
    return parts


def make_splits(
    found: Found, lists: tuple[Path, Path] | None, val_share: float, test_share: float, seed: int
) -> dict[str, list[Clip]]:
    """Training, validation and test clips.

    Args:
        found: what `find_clips` returned.
        lists: files with the training and test clips; without them speakers are held out for test.
        val_share: of the training speakers that is held out for model selection.
        test_share: of all speakers that is held out for test; unused with `lists`.
        seed: of the splits.

    Returns:
        Clips by the name of the split, one of `SPLITS`.

    Raises:
        DataError: the lists overlap, or there are too few speakers.
    """
    if lists is None:
        rest, test = split_speakers(list(found.clips.values()), test_share, seed)
    else:
        rest, test = (read_list(path, found) for path in lists)
        both = {clip.name for clip in rest} & {clip.name for clip in test}
        if both:
            raise DataError(f"{min(both)} is in the training list and in the test list")
    train, val = split_speakers(rest, val_share, seed + 1)
    return {"train": train, "val": val, "test": test}


class Row(NamedTuple):
    """What a sampler asks for: the epoch decides the augmentation."""

    epoch: int
    index: int
    counts: bool = True


class Clips(Dataset[tuple[Tensor, Tensor, int]]):
    """Spectrogram, frames and label of each clip.

    A row's augmentation is drawn from its own seed, made of `seed`, the epoch and the index. So it
    depends neither on the number of workers and processes nor on where a run was resumed.

    Args:
        clips: the clips.
        image_size: of the frames.
        frames: per clip.
        augment: whether frames are chosen, cropped and flipped at random.
        library: "torchvision" or "own", see `images.load_frames`.
        seed: of the augmentation.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        image_size: int,
        frames: int,
        augment: bool,
        library: str,
        seed: int = 0,
    ) -> None:
        self.clips = clips
        self.image_size = image_size
        self.frames = frames
        self.augment = augment
        self.library = library
        self.seed = seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, row: Row | int) -> tuple[Tensor, Tensor, int]:
        """Returns `(1, 257, 188)`, `(frames, 3, size, size)` and the label."""
        epoch, index, counts = row if isinstance(row, Row) else Row(0, row)
        clip = self.clips[index]
        spectrogram = log_spectrogram(resample(*read_wav(clip.wav)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{self.seed} {epoch} {index}").getrandbits(63))
            paths = pick_frames(clip.frames, self.frames, self.augment)
            frames = load_frames(paths, self.image_size, self.augment, self.library)
        return spectrogram, frames, clip.label if counts else IGNORED

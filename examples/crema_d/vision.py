"""Which code makes the images and the ResNets: torchvision's or this example's own."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

CHOICES = ("auto", "torchvision", "own")


def torchvision() -> ModuleType:
    """Imports torchvision.

    Raises:
        ImportError: it is not installed, or was built for another torch.
    """
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, OSError) as error:  # what a mismatch with torch looks like
        raise ImportError(f"torchvision is installed but does not load: {error}") from error


def choose(choice: str, width: int) -> str:
    """Decides between torchvision and own code.

    Args:
        choice: one of `CHOICES`; "auto" takes torchvision where it loads and has such a ResNet.
        width: channels of the ResNet's first stage; torchvision's has 64.

    Returns:
        "torchvision" or "own".

    Raises:
        ValueError: torchvision was asked for and cannot be had.
    """
    if choice == "own" or (choice == "auto" and width != 64):
        return "own"
    if width != 64:
        raise ValueError(f"--vision torchvision: its ResNet-18 has width 64, got --width {width}")
    try:
        torchvision()
    except ImportError as error:
        if choice == "torchvision":
            raise ValueError(f"--vision torchvision: {error}") from error
        if importlib.util.find_spec("torchvision") is not None:
            warnings.warn(f"{error}; using this example's own code", RuntimeWarning, stacklevel=2)
        return "own"
    return "torchvision"

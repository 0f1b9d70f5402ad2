"""Loads the compiled modules, whose import registers the ops, and keeps the error where one fails.

`dgl_ext` works without them through the pure-PyTorch backend, so a failure is not raised here: it
is kept, and `require()` raises it to whoever asks for a compiled backend.
"""

from __future__ import annotations

import importlib

import torch

MINIMUM_TORCH = (2, 10)


def check_torch(version: str) -> None:
    """Raises ImportError unless `version` of torch is one that the compiled modules can load in."""
    if tuple(map(int, version.split(".")[:2])) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"dgl_ext needs torch >= {needed}, found torch {version}: pip install 'torch>={needed}'"
        )


def _load(name: str) -> ImportError | None:
    try:
        importlib.import_module(f"dgl_ext.{name}")
    except ImportError as error:
        return error
    return None


check_torch(torch.__version__)
_error = _load("_C")


def available() -> bool:
    """Whether the C++ extension is loaded."""
    return _error is None


def error() -> Exception | None:
    """What loading the C++ extension raised; None where it is loaded."""
    return _error


def require() -> None:
    """Raises RuntimeError, chained to the real error, unless the C++ extension is loaded."""
    if _error is not None:
        raise RuntimeError(
            f"the C++ extension of dgl_ext is not loaded: {_error}. `python -m dgl_ext` tells what "
            "was built; `pip install --force-reinstall --no-deps .` builds it again."
        ) from _error

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


def _load_cuda(without: ImportError | None) -> ImportError | None:
    if without is not None:
        return without  # it defines the ops
    if torch.version.cuda is None:
        return ImportError(f"torch {torch.__version__} is built without CUDA")
    return _load("_C_cuda")


check_torch(torch.__version__)
_errors = {"cpu": _load("_C")}
_errors["cuda"] = _load_cuda(_errors["cpu"])


def available(part: str = "cpu") -> bool:
    """Whether the C++ extension is loaded, or its part "cuda", the CUDA kernels."""
    return _errors[part] is None


def error(part: str = "cpu") -> Exception | None:
    """What loading that part raised; None where it is loaded."""
    return _errors[part]


def require(part: str = "cpu") -> None:
    """Raises RuntimeError, chained to the real error, unless that part is loaded."""
    error = _errors[part]
    if error is not None:
        what = "C++ extension" if part == "cpu" else "CUDA extension"
        raise RuntimeError(
            f"the {what} of dgl_ext is not loaded: {error}. `python -m dgl_ext` tells what "
            "was built. Run from a clone, Python finds the sources before what is installed; else "
            "`pip install --force-reinstall --no-deps .` builds it again."
        ) from error

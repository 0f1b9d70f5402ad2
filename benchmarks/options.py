"""Command-line options that the benchmarks share, and the types of their arguments."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch

DTYPES = ("float64", "float32", "bfloat16", "float16")
TF32 = "tf32"  # float32, with products on CUDA that round their operands to 11 bits
# Not benchmarks/results: the README's figures are held equal to what is committed there.
DEFAULT_OUT = Path(__file__).parents[1] / "build" / "benchmarks"


def add_common(parser: argparse.ArgumentParser, dtypes: Collection[str] = DTYPES) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=dtypes, default="float32", dest="dtype_name")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder, default build/benchmarks"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and little time")


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Look the dtype up, and make the folder before anything takes its time."""
    tf32 = options.dtype_name == TF32
    if tf32 and options.device.type != "cuda":
        parser.error(f"argument --dtype: tf32 needs --device cuda, got {options.device}")
    options.dtype = torch.float32 if tf32 else getattr(torch, options.dtype_name)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder: {error}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: cannot write to {options.out}")


def some_of(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a comma-separated choice; repetitions are dropped."""

    def parse(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.split(",")))
        for name in chosen:
            if name not in allowed:
                expected = ", ".join(allowed)
                raise argparse.ArgumentTypeError(f"expected some of {expected}; got {name!r}")
        return chosen

    return parse


def positive(what: str) -> Callable[[str], float]:
    """The type of a finite number above 0; `what` says in words what it counts."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number of {what} above 0; got {text!r}")
        return value

    return parse


def whole(text: str) -> int:
    """The type of a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0; got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """The type of a comma-separated list of whole numbers above 0."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers above 0 as in 1024,4096; got {text!r}"
        )
    return sorted({int(part) for part in parts})


def device(text: str) -> torch.device:
    """The type of a device that is there."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N; got {text!r}")
    found = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= found:
        raise argparse.ArgumentTypeError(f"torch sees {found} CUDA devices here; got {text!r}")
    return chosen

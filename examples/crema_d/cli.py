"""The command line."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import dgl_ext

try:
    from rich.console import Console
    from rich.progress import track

    from . import checkpoint, processes, vision
    from .data import SPLITS, DataError, Found, find_clips, make_splits
    from .models import DEFAULT_ALPHA, METHODS
    from .train import AMP, Config, ResumeError, Trainer
except ImportError as error:
    sys.exit(f"crema_d needs rich and Pillow (pip install rich pillow): {error}")

DESCRIPTION = """Trains an audio-visual emotion classifier on CREMA-D.

    python examples/crema_d --data CREMA-D --out runs/dgl
    python examples/crema_d --data CREMA-D --out runs/joint --method joint
    torchrun --nproc-per-node 4 examples/crema_d --data CREMA-D --out runs/dgl4 --amp bf16

The README beside this program says how to get the data and what is measured.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: of the command line; those of this process if None.

    Returns:
        The exit status; 2 for errors of the user.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        config = _config(options)
        found = find_clips(options.data)
        lists = (options.train_list, options.test_list) if options.train_list else None
        splits = make_splits(found, lists, options.val_share, options.test_share, config.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        if (options.out / "last.pt").exists() and not options.resume:
            raise ResumeError(f"--out: {options.out} holds a run; --resume continues it")
        mine = processes.start(options.device)
    except (DataError, ResumeError, ValueError, OSError) as error:
        parser.error(str(error))
    try:
        return _run(options, config, found, splits, mine)
    except (DataError, ResumeError) as error:
        parser.error(str(error))
    finally:
        processes.stop()


def _run(
    options: argparse.Namespace,
    config: Config,
    found: Found,
    splits: dict[str, Any],
    mine: processes.Processes,
) -> int:
    if config.batch_size % mine.world or config.batch_size < 2 * mine.world:
        raise DataError(
            f"--batch-size: expected a multiple of the {mine.world} processes, at least two rows "
            f"each, got {config.batch_size}"
        )
    if len(splits["train"]) < 2 * mine.world:
        raise DataError(
            f"too few training clips: {len(splits['train'])} for {mine.world} processes"
        )
    console = Console(soft_wrap=True, highlight=False, quiet=not mine.first)
    trainer = Trainer(config, splits, options.out, mine, _watch(console), console.print)
    for line in _describe(config, found, splits, mine):
        console.print(line, markup=False)
    if options.resume:
        trainer.resume()
    results = {
        "config": asdict(config),
        "data": {
            "clips": {name: len(splits[name]) for name in SPLITS},
            "speakers": {name: sorted({c.speaker for c in splits[name]}) for name in SPLITS},
            "left_out": found.left_out,
        },
        "environment": {
            "torch": torch.__version__,
            "dgl_ext": dgl_ext.__version__,
            "device": str(mine.device),
            "processes": mine.world,
        },
        **trainer.run(),
    }
    if mine.first:
        checkpoint.write_json(options.out / "results.json", results)
        console.print(f"wrote {options.out / 'results.json'}", markup=False)
    return 0


def _describe(
    config: Config, found: Found, splits: dict[str, Any], mine: processes.Processes
) -> list[str]:
    sizes = ", ".join(
        f"{name} {len(splits[name])} ({len({c.speaker for c in splits[name]})} speakers)"
        for name in SPLITS
    )
    lines = [
        f"{config.method}, {config.fusion}, alpha {config.alpha:g}; ResNet-18 and crops: "
        f"{config.vision}; {mine.world} x {mine.device.type}, amp {config.amp}",
        f"clips: {sizes}",
    ]
    if found.left_out:
        reasons = Counter(found.left_out.values())
        name, reason = next(iter(found.left_out.items()))
        lines.append(f"left out: {reasons.total()} clips, for example {name}: {reason}")
    return lines


def _watch(console: Console) -> Callable[[Iterable[Any], str, int], Iterable[Any]]:
    """A progress bar on a terminal, nothing elsewhere: each epoch has its line anyway."""

    def watch(batches: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        if not console.is_terminal or console.quiet:
            return batches
        return track(batches, what, total=count, console=console, transient=True)

    return watch


def _config(options: argparse.Namespace) -> Config:
    """Makes the settings; raises ValueError where options do not go together."""
    if options.alpha is None:
        options.alpha = DEFAULT_ALPHA[options.method]
    elif options.method == "joint":
        raise ValueError("--alpha: joint training has no unimodal losses")
    if (options.train_list is None) != (options.test_list is None):
        raise ValueError("--train-list and --test-list: give both or none")
    options.vision = vision.choose(options.vision, options.width)
    return Config(**{field.name: getattr(options, field.name) for field in fields(Config)})


def make_parser() -> argparse.ArgumentParser:
    """The options; the schedule's defaults are those of the published runs."""
    parser = argparse.ArgumentParser(
        prog="crema_d",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Config()
    files = parser.add_argument_group("files")
    files.add_argument("--data", type=Path, required=True, help="folder with AudioWAV and frames")
    files.add_argument("--out", type=Path, required=True, help="folder for checkpoints, results")
    files.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    files.add_argument("--train-list", type=Path, help="file of training clips, one a line")
    files.add_argument("--test-list", type=Path, help="file of test clips, one a line")
    files.add_argument(
        "--val-share",
        type=_share,
        default=0.1,
        help="of the training speakers, held out for model selection; default 0.1",
    )
    files.add_argument(
        "--test-share",
        type=_share,
        default=0.1,
        help="of all speakers, held out for test where there are no lists; default 0.1",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default=default.method)
    method.add_argument("--fusion", choices=dgl_ext.nn.MODULES, default=default.fusion)
    method.add_argument(
        "--alpha", type=_number(0), help="of the unimodal losses; default: dgl 2, regularised 1"
    )
    method.add_argument(
        "--backend",
        choices=("auto", "fused", "library", "reference"),
        default=default.backend,
        help="of dgl_ext, default auto",
    )

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=_count, default=default.epochs)
    schedule.add_argument(
        "--batch-size", type=_count, default=default.batch_size, help="of all processes together"
    )
    schedule.add_argument("--lr", type=_number(0), default=default.lr)
    schedule.add_argument("--lr-step", type=_count, default=default.lr_step, help="epochs")
    schedule.add_argument("--lr-factor", type=_number(0), default=default.lr_factor)
    schedule.add_argument("--momentum", type=_number(0), default=default.momentum)
    schedule.add_argument("--weight-decay", type=_number(0), default=default.weight_decay)
    schedule.add_argument(
        "--clip", type=_number(0), default=default.clip, help="norm of all gradients; inf: never"
    )
    schedule.add_argument("--seed", type=int, default=default.seed, help="also of the split")

    model = parser.add_argument_group("inputs and encoders")
    model.add_argument("--image-size", type=_count, default=default.image_size)
    model.add_argument("--frames", type=_count, default=default.frames, help="per clip")
    model.add_argument("--width", type=_count, default=default.width, help="of the first stage")
    model.add_argument(
        "--vision",
        choices=vision.CHOICES,
        default="auto",
        help="whose ResNet-18 and random crops: torchvision's or this example's own",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    machine.add_argument("--amp", choices=AMP, default=default.amp, help="autocast's dtype")
    machine.add_argument(
        "--workers",
        type=_natural,
        default=min(4, os.cpu_count() or 1),
        help="loader processes per training process, default 4",
    )
    return parser


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value >= least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text!r}")
        return value

    return parse


def _share(text: str) -> float:
    value = _number(0)(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value

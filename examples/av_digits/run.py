"""Trains every method with every seed and writes the tables and plots.

    python examples/av_digits/run.py

README.md, beside this file, says what is needed and what came out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this folder is a package: its modules have common names

from av_digits import plots, report  # noqa: E402
from av_digits.data import SPLITS, DataConfig  # noqa: E402
from av_digits.methods import METHODS  # noqa: E402
from av_digits.speech import SpeechError, load_bank  # noqa: E402
from av_digits.train import Run, TrainConfig, run_method  # noqa: E402

SMOKE_DATA = DataConfig(train_per_digit=8, test_per_digit=4, clips_per_digit=8)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--batch-norm", action="store_true", help="in the encoders")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="of the speech")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch, few samples")
    options = parser.parse_args(words)
    options.data = SMOKE_DATA if options.smoke else DataConfig()
    if options.smoke:
        # One process: starting a second one takes longer than the work.
        options.seeds, options.epochs, options.workers = options.seeds[:1], 1, 1
    options.out = options.out or HERE / "results" / ("smoke" if options.smoke else "")
    return options


def run_all(options: argparse.Namespace, config: TrainConfig, console: Console) -> list[Run]:
    """Every method with every seed, in several processes; sorted by seed and method."""
    work = [(name, seed) for seed in options.seeds for name in options.methods]
    progress = Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    runs: list[Run] = []
    # Fresh processes, not forked ones: a fork inherits torch's threads in no usable state.
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"))
    with progress, pool:
        bar = progress.add_task("training", total=len(work))
        waiting = [
            pool.submit(run_method, name, seed, options.data, config, options.cache)
            for name, seed in work
        ]
        for done in as_completed(waiting):
            runs.append(done.result())
            label = f"{METHODS[runs[-1].method].label}, seed {runs[-1].seed}"
            progress.update(bar, advance=1, description=label)
            if not console.is_terminal:
                console.print(f"[{len(runs)}/{len(work)}] {label}", markup=False)
    return sorted(runs, key=lambda run: work.index((run.method, run.seed)))


def main(words: list[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    options = parse(words)
    console = Console()
    start = time.perf_counter()
    try:
        with console.status("speech"):
            for split in SPLITS:
                load_bank(split, options.data.clips_per_digit, options.cache)
    except SpeechError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    config = TrainConfig(
        epochs=options.epochs,
        lr=options.lr,
        batch_norm=options.batch_norm,
    )
    runs = run_all(options, config, console)
    seconds = time.perf_counter() - start

    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "examples/av_digits/run.py", *(words or sys.argv[1:])])
    document = report.make(runs, options.data, config, options.cache, command, seconds)
    report.write(document, options.out)
    plots.write(document, options.out)
    console.print(report.table(document), markup=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s. Tables and plots are in {options.out}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

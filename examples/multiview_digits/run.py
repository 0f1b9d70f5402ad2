"""Trains every method with every seed and writes the tables and the plot.

    python examples/multiview_digits/run.py

README.md, beside this file, says what came out.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this folder is a package: its modules have common names

import dgl_ext  # noqa: E402
from multiview_digits import report  # noqa: E402
from multiview_digits.data import DataError, load_views  # noqa: E402
from multiview_digits.train import METHODS, PAIRS, Config, run  # noqa: E402

SMOKE = Config(train=60, test=60, epochs=2)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 to 4"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="folder of the data")
    parser.add_argument("--out", type=Path, help="folder of the results, default results/ here")
    parser.add_argument("--smoke", action="store_true", help="a quick look; measures nothing")
    options = parser.parse_args(words)
    options.out = options.out or HERE / "results" / ("smoke" if options.smoke else "")
    if options.smoke:
        options.seeds, options.workers = options.seeds[:1], 1
    return options


def run_all(work: list[tuple[str, int]], job: Any, workers: int) -> list[dict[str, Any]]:
    """All jobs, in the order of `work`; in this process if there is to be only one."""
    if workers == 1:
        return [job(*item) for item in work]
    # Fresh processes, not forked ones: a fork inherits torch's threads in no usable state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*work, strict=True)))


def main(words: list[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    options = parse(words)
    start = time.perf_counter()
    try:
        load_views(options.cache)  # once, before there are several processes
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = SMOKE if options.smoke else Config()
    pairs = list(PAIRS)[:2] if options.smoke else list(PAIRS)
    work = [(method, seed) for method in METHODS for seed in options.seeds]
    job = partial(run, config=config, cache=options.cache, pairs=pairs)
    runs = run_all(work, job, options.workers)
    document = {
        "command": " ".join(["python examples/multiview_digits/run.py", *(words or sys.argv[1:])]),
        "config": repr(config),
        "seconds": round(time.perf_counter() - start),
        "workers": options.workers,
        "versions": f"torch {torch.__version__}, dgl_ext {dgl_ext.__version__}",
        "seeds": options.seeds,
        "pairs": pairs,
        "runs": runs,
    }
    report.write(document, options.out)
    print((options.out / "results.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

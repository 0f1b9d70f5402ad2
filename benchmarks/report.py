"""Progress, terminal output, result files and colours, shared by the benchmarks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 120
BUSY = 0.05
SHORT_NAMES = {"linear_cross_entropy": "linear_ce"}
COLORS = {
    "joint": "#555555",
    "two_pass": "#d55e00",
    "reference": "#0072b2",
    "compiled": "#cc79a7",
    "linear_cross_entropy": "#56b4e9",
    "liger": "#f0e442",
    "fused": "#000000",
    "library": "#e69f00",
    "dgl_ext_logits": "#85d0b4",
    "dgl_ext": "#009e73",
}


def make_console() -> Console:
    """A console on standard output; where that is no terminal, plain text of a fixed width."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


class CellProgress:
    """A progress bar over the cells of a benchmark; one plain line per cell without a terminal."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console = console
        self._cells = cells
        self._done = 0
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total} {task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=cells)

    def __enter__(self) -> CellProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, label: str) -> Callable[[float], None]:
        """Start a cell; returns the function that takes the share of it that is done (0 to 1)."""
        if not self._console.is_terminal:
            self._console.print(f"[{self._done + 1}/{self._cells}] {label}", markup=False)
        self._bar.update(self._task, description=label)
        start = self._done
        self._done += 1
        return lambda share: self._bar.update(self._task, completed=start + share)


def short_name(provider: str) -> str:
    """A provider's name as it fits a table of 80 columns."""
    return SHORT_NAMES.get(provider, provider)


def conditions(document: dict[str, Any]) -> str:
    """Machine, dtype, versions, commit and date of a run, in one line."""
    env = document["environment"]
    return (
        f"{machine(env)}; {document['dtype']}; torch {env['torch']}, dgl_ext {env['dgl_ext']}, "
        f"commit {env['git_sha']}, {env['date']}"
    )


def machine(env: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    return env["gpu"] or f"{env['cpu']}, threads: {env['threads']}"


def busy(foreign_load: float | None) -> list[str]:
    """A warning, if the machine was not ours alone."""
    if foreign_load is None or foreign_load <= BUSY:
        return []
    return [f"Busy: other processes took {foreign_load:.0%} of the CPUs while this was timed."]


def result_paths(out: Path, benchmark: str, document: dict[str, Any], *, smoke: bool) -> list[Path]:
    """Where JSON, CSV and plot of a run go: named by benchmark, device and dtype."""
    kind = document["device"].partition(":")[0]
    stem = f"bench_{benchmark}_{kind}_{document['dtype']}" + ("_smoke" if smoke else "")
    return [out / f"{stem}.{ending}" for ending in ("json", "csv", "png")]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a result document."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows; what a row lacks stays empty, what is no column is an error."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

"""What the benchmarks show of their results: progress, tables, sentences and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SUBJECT = "dgl_ext"
PLAIN_WIDTH = 120
BUSY = 0.05
UNSTEADY = 1.5
VERBS = {"left out": "was left out", "wrong": "is wrong", "skipped": "was skipped"}
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

Row = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]  # heading, and a row's text under it


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


def print_results(
    console: Console, document: dict[str, Any], details: Iterable[str], tables: Iterable[Table]
) -> None:
    """Print what was measured and how, the tables, and the summary."""
    env = document["environment"]
    lines = [
        f"one step: {document['step']}",
        f"{machine(env)}; {document['dtype']}; torch {env['torch']}, dgl_ext {env['dgl_ext']}, "
        f"commit {env['git_sha']}, {env['date']}",
        *details,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for table in tables:
        console.print(table)
    for sentence in document["summary"]:
        console.print(f"* {sentence}", markup=False, highlight=False)


def machine(env: dict[str, Any]) -> str:
    """The GPU, or the CPU and its threads."""
    return env["gpu"] or f"{env['cpu']}, threads: {env['threads']}"


def make_table(
    rows: list[Row], cells: str, cell: Callable[[Row], str], columns: Columns, title: str = ""
) -> Table:
    """One block of lines per cell (`cells` says of what), a line per provider; 80 columns."""
    table = Table(
        title=f"\n{title}" if title else None, title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column(cells, no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(map(cell, rows)):
        table.add_row(name, style="bold")
        for row in rows:
            if cell(row) == name:
                ok = row["status"] == "ok"
                texts = [text(row) for _, text in columns] if ok else ["-", row["status"]]
                provider = SHORT_NAMES.get(row["provider"], row["provider"])
                table.add_row(f"  {provider}", *texts)
    return table


def ratio(key: str, digits: int = 2) -> Callable[[Row], str]:
    """The text of a ratio, for a column."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def compare(
    rows: list[Row], cell: Callable[[Row], str], prefix: str = "ratio", unit: str = "times as long"
) -> list[str]:
    """Say what the subject takes against each other provider, where it is worse included."""
    sentences = []
    for other in dict.fromkeys(row["provider"] for row in rows):
        key = f"{prefix}_to_{other}"
        mine = [row for row in rows if row["provider"] == SUBJECT and key in row]
        if other == SUBJECT or not mine:
            continue
        mine.sort(key=lambda row: row[key])
        worse = [row for row in mine if row.get(f"{key}_p20", row[key]) > 1]
        better = [row for row in mine if row.get(f"{key}_p80", row[key]) < 1]
        text = (
            f"Against {other}, {SUBJECT} takes {mine[0][key]:.2f} ({cell(mine[0])}) to "
            f"{mine[-1][key]:.2f} ({cell(mine[-1])}) {unit}: less in {len(better)} of {len(mine)} "
            f"cells, more in {len(worse)}, undecided in {len(mine) - len(better) - len(worse)}."
        )
        if worse:
            listed = ", ".join(f"{cell(row)} by {row[key] - 1:.0%}" for row in reversed(worse))
            text += f" It takes more at {listed}."
        sentences.append(text)
    return sentences


def not_measured(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """One sentence per reason for which rows have no figures, and per note on those that have."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok" or row["note"]:
            reason = (row["provider"], row["status"], row["note"])
            cells.setdefault(reason, []).append(cell(row))
    total = len(set(map(cell, rows)))
    return [
        f"{provider} {VERBS.get(status, status)} at "
        f"{'every cell' if len(where) == total else ', '.join(where)}: {note}"
        for (provider, status, note), where in cells.items()
    ]


def noise(rows: list[Row], foreign_load: float | None) -> list[str]:
    """Warnings, if times were far from steady or the machine was not ours alone."""
    sentences = []
    timed = [row for row in rows if "p80_us" in row]
    unsteady = [row for row in timed if row["p80_us"] > UNSTEADY * row["p20_us"]]
    if unsteady:
        sentences.append(
            f"Unsteady: in {len(unsteady)} of {len(timed)} rows p80 is more than {UNSTEADY} times "
            "p20; there the times are too long and the ratios uncertain."
        )
    if foreign_load is not None and foreign_load > BUSY:
        share = f"{foreign_load:.0%}"
        sentences.append(f"Busy: other processes took {share} of the CPUs while this was timed.")
    return sentences


def write(
    out: Path,
    benchmark: str,
    document: dict[str, Any],
    columns: Sequence[str],
    *,
    smoke: bool,
    plot: Callable[[Path, dict[str, Any]], None] | None = None,
) -> list[Path]:
    """Write JSON, CSV and, where there is one, the plot; returns the paths."""
    paths = result_paths(out, benchmark, document, smoke=smoke)
    paths[0].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)  # what a row lacks stays empty
        writer.writeheader()
        writer.writerows(document["rows"])
    if plot is None:
        return paths[:2]
    plot(paths[2], document)
    return paths


def result_paths(out: Path, benchmark: str, document: dict[str, Any], *, smoke: bool) -> list[Path]:
    """Where JSON, CSV and plot of a run go: named by benchmark, device and dtype."""
    kind = document["device"].partition(":")[0]
    stem = f"bench_{benchmark}_{kind}_{document['dtype']}" + ("_smoke" if smoke else "")
    return [out / f"{stem}.{ending}" for ending in ("json", "csv", "png")]

"""The memory benchmark's results as a table, a plot and sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import report
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot

SUBJECT = "dgl_ext"
MARKERS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "up",
    "v": "down",
    "P": "plus",
    "*": "star",
    "X": "cross",
}  # one for each number of rows, from the smallest

Row = dict[str, Any]


def cell_name(rows: int, classes: int) -> str:
    """Rows and classes in one word."""
    return f"{rows}x{classes}"


def _cell(row: Row) -> str:
    return cell_name(row["rows"], row["classes"])


def _mib(size: float) -> str:
    mib = size / 2**20
    return f"{mib:,.1f}" if mib < 100 else f"{mib:,.0f}"


def _timed(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["provider"] == name and row["status"] == "ok"]


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, the table and the summary."""
    for line in (
        f"one step: {document['step']}; width {document['width']}",
        report.conditions(document),
        f"workspace limit: {_mib(document['workspace_limit'])} MiB; {document['statistic']}",
    ):
        console.print(line, markup=False, highlight=False)
    console.print(_table(document["rows"]))
    for sentence in document["summary"]:
        console.print(f"* {sentence}", markup=False, highlight=False)


def _table(rows: list[Row]) -> Table:
    """One block of lines per size; sizes in MiB; fits 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("rows x classes", no_wrap=True)
    for name in ("extra", "gradients", "rest", "/limit", "ms", "/joint", "/linear_ce"):
        table.add_column(name, justify="right", no_wrap=True)
    cell = None
    for row in rows:
        if cell != _cell(row):
            cell = _cell(row)
            table.add_row(cell, style="bold")
        name = f"  {report.short_name(row['provider'])}"
        if row["status"] != "ok":
            table.add_row(name, row["status"])
            continue
        table.add_row(
            name,
            *(_mib(row[f"{part}_bytes"]) for part in ("extra", "gradient", "rest")),
            f"{row['rest_by_limit']:.2f}",
            f"{row['median_us'] / 1000:,.1f}",
            *(_ratio(row, other) for other in ("joint", "linear_cross_entropy")),
        )
    return table


def _ratio(row: Row, other: str) -> str:
    ratio = row.get(f"ratio_to_{other}")
    return "-" if ratio is None else f"{ratio:.2f}"


def describe(rows: list[Row], limit: int, foreign_load: float | None) -> list[str]:
    """Say in words what the rows show about the subject, where it is worse included."""
    sentences = []
    mine = _timed(rows, SUBJECT)
    if mine:
        sentences.append(_beyond_the_gradients(mine, limit))
        sentences.append(_at_the_largest(rows, mine))
        sentences += [
            _against(pairs, other)
            for other in _names(rows)
            if other != SUBJECT and (pairs := [row for row in mine if f"ratio_to_{other}" in row])
        ]
    else:
        sentences.append(f"{SUBJECT} was not measured.")
    return sentences + _not_measured(rows) + report.busy(foreign_load)


def _extremes(rows: list[Row], key: Callable[[Row], float]) -> tuple[Row, Row]:
    return min(rows, key=key), max(rows, key=key)


def _beyond_the_gradients(rows: list[Row], limit: int) -> str:
    low, high = _extremes(rows, lambda row: row["rest_bytes"])
    within = sum(row["rest_bytes"] <= limit for row in rows)
    return (
        f"Beyond the gradients, {SUBJECT} takes {_mib(low['rest_bytes'])} MiB ({_cell(low)}) to "
        f"{_mib(high['rest_bytes'])} MiB ({_cell(high)}); the limit of {_mib(limit)} MiB holds in "
        f"{within} of {len(rows)} cells."
    )


def _at_the_largest(rows: list[Row], mine: list[Row]) -> str:
    """All providers at the largest size at which the subject was measured."""
    largest = max(mine, key=lambda row: row["rows"] * row["classes"])
    peaks = ", ".join(
        f"{row['provider']} {_mib(row['extra_bytes'])} MiB"
        for row in rows
        if _cell(row) == _cell(largest) and row["status"] == "ok"
    )
    gradients = _mib(largest["gradient_bytes"])
    return f"At {_cell(largest)} a step takes at its peak {peaks}; the gradients are {gradients}."


def _against(rows: list[Row], other: str) -> str:
    key = f"ratio_to_{other}"
    low, high = _extremes(rows, lambda row: row[key])
    slower = sum(row[key] > 1 for row in rows)
    return (
        f"Against {other}, {SUBJECT} takes {low[key]:.2f} ({_cell(low)}) to {high[key]:.2f} "
        f"({_cell(high)}) times as long; slower in {slower} of {len(rows)} cells."
    )


def _not_measured(rows: list[Row]) -> list[str]:
    """One sentence per reason for which rows have no figures."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reason = (row["provider"], row["status"], row["note"])
            cells.setdefault(reason, []).append(_cell(row))
    total = len({_cell(row) for row in rows})
    verbs = {"wrong": "is wrong", "failed": "failed"}
    return [
        f"{provider} {verbs.get(status, f'was {status}')} at "
        f"{'every size' if len(where) == total else ', '.join(where)}: {note}"
        for (provider, status, note), where in cells.items()
    ]


def plot(path: Path, document: dict[str, Any]) -> None:
    """Draw peak memory and time over rows x classes, both axes logarithmic."""
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(13, 5.5))
    _draw(memory, rows, lambda row: row["extra_bytes"] / 2**20)
    _draw(time, rows, lambda row: row["median_us"] / 1e6)
    limit = document["workspace_limit"] / 2**20
    gradients = {(row["rows"], row["classes"]): row["gradient_bytes"] / 2**20 for row in rows}
    for count in sorted({row["rows"] for row in rows}):
        line = sorted((n * c, value) for (n, c), value in gradients.items() if n == count)
        memory.plot(
            [x for x, _ in line],
            [value + limit for _, value in line],
            color="black",
            linestyle=":",
            linewidth=1,
            label="gradients + workspace limit",
        )
    memory.set_ylabel("peak memory of a step beyond its inputs, MiB")
    time.set_ylabel("seconds a step")
    for axis in (memory, time):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("rows x classes")
        axis.grid(alpha=0.3)
    by_name = {
        name: handle for handle, name in zip(*memory.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        by_name.values(),
        by_name.keys(),
        loc="upper center",
        ncols=max(1, len(by_name)),
        frameon=False,
        fontsize=9,
    )
    env = document["environment"]
    marks = ", ".join(f"{MARKERS[mark]} {count}" for count, mark in _marks(rows).items())
    figure.text(
        0.5,
        0.01,
        f"{document['step']}; width {document['width']}, {document['dtype']}. Rows: {marks}.\n"
        f"{report.machine(env)}, torch {env['torch']}, {env['date'][:10]}",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 0.94))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _marks(rows: list[Row]) -> dict[int, str]:
    """The marker of each number of rows; the last is for all that are left."""
    counts, marks = sorted({row["rows"] for row in rows}), list(MARKERS)
    return {count: marks[min(i, len(marks) - 1)] for i, count in enumerate(counts)}


def _draw(axis: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """One line per provider and number of rows; the marker tells the rows."""
    for name in _names(rows):
        for count, mark in _marks(rows).items():
            mine = [row for row in _timed(rows, name) if row["rows"] == count]
            mine.sort(key=lambda row: row["classes"])
            axis.plot(
                [row["rows"] * row["classes"] for row in mine],
                [value(row) for row in mine],
                marker=mark,
                markersize=5,
                linewidth=1.2,
                color=report.COLORS.get(name),
                label=name,
            )

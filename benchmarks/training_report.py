"""The training benchmark's results as a table, a plot and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import report
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot

SUBJECT = "dgl_ext"
MIB = 1 << 20
PANELS = (("ratio_to_joint", "time"), ("peak_ratio_to_joint", "peak memory"))

Row = dict[str, Any]


def _cell(row: Row) -> str:
    return f"{row['network']} {row['fusion']}, batch {row['batch']}"


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, one table and the summary."""
    conditions = [
        f"one step: {document['step']}",
        report.conditions(document),
        f"times and ratios: {document['statistic']}",
        f"memory: {document['memory']}",
    ]
    for line in conditions:
        console.print(line, markup=False, highlight=False)
    console.print(_table(document["rows"]))
    for sentence in document["summary"]:
        console.print(f"* {sentence}", markup=False, highlight=False)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("ms", "p20-p80", "/joint", "/two_pass", "MiB", "/joint", "/two_pass"):
        table.add_column(name, justify="right", no_wrap=True)
    cell = None
    for row in rows:
        if cell != _cell(row):
            cell = _cell(row)
            table.add_row(cell, style="bold")
        if row["status"] != "ok":
            table.add_row(f"  {row['provider']}", "-", row["status"])
            continue
        table.add_row(
            f"  {row['provider']}",
            f"{row['median_us'] / 1e3:.2f}",
            f"{row['p20_us'] / 1e3:.2f}-{row['p80_us'] / 1e3:.2f}",
            *(_ratio(row, f"ratio_to_{other}") for other in ("joint", "two_pass")),
            f"{row['peak_bytes'] / MIB:.1f}" if "peak_bytes" in row else "-",
            *(_ratio(row, f"peak_ratio_to_{other}") for other in ("joint", "two_pass")),
        )
    return table


def _ratio(row: Row, key: str) -> str:
    return f"{row[key]:.3f}" if key in row else "-"


def describe(rows: list[Row], subject: str = SUBJECT) -> list[str]:
    """Say in words what the rows show about one provider."""
    sentences = []
    for row in rows:
        if row["provider"] != subject or row["status"] != "ok":
            continue
        parts = []
        for other in ("joint", "two_pass"):
            time, memory = row.get(f"ratio_to_{other}"), row.get(f"peak_ratio_to_{other}")
            if time is not None:
                parts.append(
                    f"{time:.3f} ({row[f'ratio_to_{other}_p20']:.3f} to "
                    f"{row[f'ratio_to_{other}_p80']:.3f}) of {other}'s time"
                )
            if memory is not None:
                parts.append(f"{memory:.3f} of its peak memory")
        if parts:
            sentences.append(f"{_cell(row)}: {subject} takes {', '.join(parts)}.")
    for row in rows:
        if row["note"]:
            sentences.append(f"{_cell(row)}: {row['provider']}: {row['status']}: {row['note']}")
    return sentences


def plot(path: Path, document: dict[str, Any]) -> None:
    """Draw each provider's time and peak memory relative to joint."""
    rows = [row for row in document["rows"] if row["status"] == "ok"]
    cells = list(dict.fromkeys(_cell(row) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 + 2.5 * max(1, len(cells)), 4.5))
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for index, name in enumerate(names):
            mine = [row for row in rows if row["provider"] == name and key in row]
            shift = (index - (len(names) - 1) / 2) * 0.8 / len(names)
            low = [max(0.0, row[key] - row.get(f"{key}_p20", row[key])) for row in mine]
            high = [max(0.0, row.get(f"{key}_p80", row[key]) - row[key]) for row in mine]
            axis.bar(
                [cells.index(_cell(row)) + shift for row in mine],
                [row[key] for row in mine],
                0.8 / len(names),
                yerr=[low, high],
                capsize=2,
                color=report.COLORS.get(name),
                label=name,
            )
        axis.axhline(1, color=report.COLORS["joint"], linewidth=0.8)
        axis.set_xticks(range(len(cells)), cells, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel(f"{title} / {title} of joint")
        axis.grid(axis="y", alpha=0.3)
    if names:
        axes[0].legend(frameon=False, fontsize=8)
    env = document["environment"]
    figure.text(
        0.5,
        0.01,
        f"One training step ({document['step']}), lower is better; time: median, p20 to p80.\n"
        f"{report.machine(env)}, {document['dtype']}, torch {env['torch']}, {env['date'][:10]}",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

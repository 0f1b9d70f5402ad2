"""The fusion benchmark's results as a table, a plot and sentences."""

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
EXECUTIONS = {"eager": "eager", "graph": "CUDA graph"}
UNSTEADY = 1.5
SPREAD_OF_MARKERS = 0.75  # of the distance of two sizes in the plot
LINEAR_UP_TO = 5  # times joint; a plot with longer times has a logarithmic axis

Row = dict[str, Any]


def _size(row: Row) -> str:
    return f"{row['batch']}x{row['width']}x{row['classes']}"


def _cell(row: Row) -> str:
    return f"{row['fusion']} {_size(row)}"


def _execution(row: Row) -> str:
    return row.get("execution", "eager")  # documents from before there were others lack it


def _executions(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(_execution(row) for row in rows))


def _by_execution(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each execution, with its name; that is empty where all is eager."""
    executions = _executions(rows)
    plain = executions == ["eager"]
    return [
        ("" if plain else EXECUTIONS[way], [row for row in rows if _execution(row) == way])
        for way in executions
    ]


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, one table per fusion and execution, and the summary."""
    for line in _conditions(document):
        console.print(line, markup=False, highlight=False)
    rows = document["rows"]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        for way, here in _by_execution([row for row in rows if row["fusion"] == fusion]):
            console.print(_table(f"{fusion}, {way}" if way else fusion, here))
    for sentence in document["summary"]:
        console.print(f"* {sentence}", markup=False, highlight=False)


def _conditions(document: dict[str, Any]) -> list[str]:
    ceiling = document["ceiling"]
    return [
        f"one step: {document['step']}",
        report.conditions(document),
        f"measured ceiling: {ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s (matrix product), "
        f"{ceiling['bytes_per_second'] / 1e9:,.1f} GB/s (copy)",
        f"times and ratios: {document['statistic']}",
    ]


def _table(title: str, rows: list[Row]) -> Table:
    """One block of lines per size; fits 80 columns."""
    counted = any(row.get("launches") is not None for row in rows)
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("B x D x C", no_wrap=True)
    names = ("us", "p20-p80", "/joint", "/2-pass", "rate", "ceiling")
    for name in (*names, "kernels") if counted else names:
        table.add_column(name, justify="right", no_wrap=True)
    size = None
    for row in rows:
        if size != _size(row):
            size = _size(row)
            table.add_row(size, style="bold")
        name = f"  {report.short_name(row['provider'])}"
        if row["status"] != "ok":
            table.add_row(name, "-", row["status"])
            continue
        table.add_row(
            name,
            _us(row["median_us"]),
            f"{_us(row['p20_us'])}-{_us(row['p80_us'])}",
            _ratio(row, "joint"),
            _ratio(row, "two_pass"),
            _rate(row),
            f"{row['share_of_ceiling']:.1%}",
            *([_launches(row)] if counted else []),
        )
    return table


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _launches(row: Row) -> str:
    launches = row.get("launches")
    return "-" if launches is None else str(launches)


def _ratio(row: Row, other: str) -> str:
    ratio = row.get(f"ratio_to_{other}")
    return "-" if ratio is None else f"{ratio:.2f}"


def _rate(row: Row) -> str:
    """The rate whose ceiling is the nearer one."""
    if row["bound"] == "compute":
        if row["gflops_per_s"] >= 10_000:
            return f"{row['gflops_per_s'] / 1000:.1f} TFLOP/s"
        return f"{row['gflops_per_s']:.1f} GFLOP/s"
    return f"{row['gbytes_per_s']:.2f} GB/s"


def describe(
    rows: list[Row], subject: str = SUBJECT, foreign_load: float | None = None
) -> list[str]:
    """Say in words what the rows show about one provider, slow cells included."""
    sentences = []
    for way, here in _by_execution(rows):
        timed = [row for row in here if row["provider"] == subject and row["status"] == "ok"]
        where = f" ({way})" if way else ""
        for other in dict.fromkeys(row["provider"] for row in here):
            pairs = [row for row in timed if f"ratio_to_{other}" in row]
            if other != subject and pairs:
                sentences.append(_compare(pairs, subject, other, where))
        if not timed:
            sentences.append(f"{subject} was not timed{where}.")
    return sentences + _not_timed(rows) + _kernels(rows) + _noise(rows, foreign_load)


def _compare(rows: list[Row], subject: str, other: str, where: str) -> str:
    """One sentence on a subject's rows against another provider."""
    key = f"ratio_to_{other}"
    ordered = sorted(rows, key=lambda row: row[key])
    low, high = ordered[0], ordered[-1]
    slower = [row for row in ordered if row[f"{key}_p20"] > 1]
    faster = [row for row in ordered if row[f"{key}_p80"] < 1]
    undecided = len(rows) - len(faster) - len(slower)
    text = (
        f"Against {other}{where}, {subject} takes {low[key]:.2f} ({_cell(low)}) to {high[key]:.2f} "
        f"({_cell(high)}) times as long: faster in {len(faster)} of {len(rows)} cells, slower in "
        f"{len(slower)}, undecided in {undecided} (p20 to p80 of the ratio spans 1)."
    )
    if slower:
        listed = ", ".join(f"{_cell(row)} by {row[key] - 1:.0%}" for row in reversed(slower))
        text += f" {subject} is slower than {other}{where} at {listed}."
    return text


def _not_timed(rows: list[Row]) -> list[str]:
    """One sentence per reason for which rows have no figures."""
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["status"] != "ok":
            ways = cells.setdefault((row["provider"], row["status"], row["note"]), {})
            ways.setdefault(_execution(row), []).append(_cell(row))
    total = len({_cell(row) for row in rows})
    verbs = {"left out": "was left out", "wrong": "is wrong", "failed": "failed"}
    sentences = []
    for (provider, status, note), ways in cells.items():
        places = {EXECUTIONS[way]: where for way, where in ways.items()}
        first = next(iter(ways.values()))
        if len(ways) == len(_executions(rows)) and all(where == first for where in ways.values()):
            places = {"": first}  # however executed
        for way, where in places.items():
            sentences.append(
                f"{provider}{f' ({way})' if way else ''} {verbs[status]} at "
                f"{'every cell' if len(where) == total else ', '.join(where)}: {note}"
            )
    return sentences


def _kernels(rows: list[Row]) -> list[str]:
    """How many kernels each provider launches, and why that is not known where it is not."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row.get("launches") is not None:
            counts.setdefault(row["provider"], set()).add(row["launches"])
    listed = [
        f"{name} {min(found)}" + (f" to {max(found)}" if len(found) > 1 else "")
        for name, found in counts.items()
    ]
    notes = dict.fromkeys(
        f"{row['provider']}: {row['note']}" for row in rows if row["status"] == "ok" and row["note"]
    )
    return ([f"Kernels a step: {', '.join(listed)}."] if listed else []) + list(notes)


def _noise(rows: list[Row], foreign_load: float | None) -> list[str]:
    """Warnings, if times were far from steady or the machine was not ours alone."""
    sentences = []
    timed = [row for row in rows if row["status"] == "ok"]
    unsteady = [row for row in timed if row["p80_us"] > UNSTEADY * row["p20_us"]]
    if unsteady:
        sentences.append(
            f"Unsteady: in {len(unsteady)} of {len(timed)} rows p80 is more than {UNSTEADY} times "
            "p20; there the times are too long and the ratios uncertain."
        )
    return sentences + report.busy(foreign_load)


def plot(path: Path, document: dict[str, Any]) -> None:
    """Draw each provider's time relative to joint (or its time, where joint was not timed)."""
    fusions = list(dict.fromkeys(row["fusion"] for row in document["rows"]))
    executions = _by_execution(document["rows"])
    names = list(dict.fromkeys(r["provider"] for r in document["rows"] if r["status"] == "ok"))
    figure, axes = pyplot.subplots(
        len(executions),
        len(fusions),
        figsize=(1 + 4.5 * len(fusions), 5 * len(executions)),
        sharey="row",
        squeeze=False,
    )
    for row_of_axes, (way, rows) in zip(axes, executions, strict=True):
        _plot_execution(
            row_of_axes, way, [row for row in rows if row["status"] == "ok"], fusions, names
        )
    by_name: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            by_name.setdefault(name, handle)
    figure.legend(
        by_name.values(),
        by_name.keys(),
        loc="upper center",
        ncols=max(1, len(names)),
        frameon=False,
    )
    env = document["environment"]
    figure.text(
        0.5,
        0.01,
        f"One training step ({document['step']}) by B x D x C, lower is better; median and p20 to "
        f"p80 over rounds.\n{report.machine(env)}, {document['dtype']}, torch {env['torch']}, "
        f"{env['date'][:10]}",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.06 / len(executions), 1, 1 - 0.06 / len(executions)))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_execution(
    axes: Any, execution: str, rows: list[Row], fusions: list[str], names: list[str]
) -> None:
    """Draw the rows of one execution, one axis per fusion."""
    relative = all("ratio_to_joint" in row for row in rows)
    key = "ratio_to_joint" if relative else "median_us"
    low_key, high_key = (f"{key}_p20", f"{key}_p80") if relative else ("p20_us", "p80_us")
    for axis, fusion in zip(axes, fusions, strict=True):
        here = [row for row in rows if row["fusion"] == fusion]
        sizes = list(dict.fromkeys(_size(row) for row in here))
        for index, name in enumerate(names):
            mine = [row for row in here if row["provider"] == name]
            shift = (index - (len(names) - 1) / 2) * SPREAD_OF_MARKERS / len(names)
            axis.errorbar(
                [sizes.index(_size(row)) + shift for row in mine],
                [row[key] for row in mine],
                yerr=[
                    [max(0, row[key] - row[low_key]) for row in mine],
                    [max(0, row[high_key] - row[key]) for row in mine],
                ],
                fmt="o",
                markersize=5,
                capsize=2,
                color=report.COLORS.get(name),
                label=name,
            )
        axis.set_title(f"{fusion}, {execution}" if execution else fusion)
        axis.set_xticks(range(len(sizes)), sizes, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        if relative:
            axis.axhline(1, color=report.COLORS["joint"], linewidth=0.8)
    highest = max((row[key] for row in rows), default=1)
    if relative and highest <= LINEAR_UP_TO:
        axes[0].set_ylim(0, 1.2 * highest)
    else:
        axes[0].set_yscale("log")  # the axes of a row share it
    axes[0].set_ylabel("time / time of joint" if relative else "microseconds a step")

"""The fusion benchmark's results as tables, sentences and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import report
from report import Row
from rich.console import Console

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot

EXECUTIONS = {"eager": "eager", "graph": "CUDA graph"}
SPREAD_OF_MARKERS = 0.75  # of the distance of two sizes in the plot
LINEAR_UP_TO = 5  # times joint; a plot with longer times has a logarithmic axis


def _size(row: Row) -> str:
    return f"{row['batch']}x{row['width']}x{row['classes']}"


def by_execution(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each execution, with its name; that is empty where all is eager."""
    ways = list(dict.fromkeys(row["execution"] for row in rows))
    plain = ways == ["eager"]
    return [
        ("" if plain else EXECUTIONS[way], [row for row in rows if row["execution"] == way])
        for way in ways
    ]


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, one table per fusion and execution, and the summary."""
    rows, ceiling = document["rows"], document["ceiling"]
    details = (
        f"measured ceiling: {ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s (matrix product), "
        f"{ceiling['bytes_per_second'] / 1e9:,.1f} GB/s (copy)",
        f"times and ratios: {document['statistic']}",
    )
    columns = [
        ("us", lambda row: _us(row["median_us"])),
        ("p20-p80", lambda row: f"{_us(row['p20_us'])}-{_us(row['p80_us'])}"),
        ("/joint", report.ratio("ratio_to_joint")),
        ("/2-pass", report.ratio("ratio_to_two_pass")),
        ("rate", _rate),
        ("ceiling", lambda row: f"{row['share_of_ceiling']:.1%}"),
    ]
    if any(row["launches"] is not None for row in rows):
        columns.append(("kernels", report.ratio("launches", 0)))
    tables = [
        report.make_table(here, "B x D x C", _size, columns, f"{fusion}, {way}" if way else fusion)
        for fusion in dict.fromkeys(row["fusion"] for row in rows)
        for way, here in by_execution([row for row in rows if row["fusion"] == fusion])
    ]
    report.print_results(console, document, details, tables)


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _rate(row: Row) -> str:
    """The rate whose ceiling is the nearer one."""
    if row["bound"] == "compute":
        if row["gflops_per_s"] >= 10_000:
            return f"{row['gflops_per_s'] / 1000:.1f} TFLOP/s"
        return f"{row['gflops_per_s']:.1f} GFLOP/s"
    return f"{row['gbytes_per_s']:.2f} GB/s"


def describe(rows: list[Row], foreign_load: float | None = None) -> list[str]:
    """Say in words what the rows show, slow cells included."""
    sentences = []
    for way, here in by_execution(rows):

        def cell(row: Row, where: str = f" ({way})" if way else "") -> str:
            return f"{row['fusion']} {_size(row)}{where}"

        sentences += report.compare(here, cell) + report.not_measured(here, cell)
    return sentences + _kernels(rows) + report.noise(rows, foreign_load)


def _kernels(rows: list[Row]) -> list[str]:
    """How many kernels each provider launches."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row["launches"] is not None:
            counts.setdefault(row["provider"], set()).add(row["launches"])
    listed = [
        f"{name} {min(found)}" + (f" to {max(found)}" if len(found) > 1 else "")
        for name, found in counts.items()
    ]
    return [f"Kernels a step: {', '.join(listed)}."] if listed else []


def plot(path: Path, document: dict[str, Any]) -> None:
    """Draw each provider's time relative to joint (or its time, where joint was not timed)."""
    fusions = list(dict.fromkeys(row["fusion"] for row in document["rows"]))
    executions = by_execution(document["rows"])
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

"""The fusion benchmark's results as a table, a plot and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot

SUBJECT = "dgl_ext"
MODES = {"eager": "eager", "graph": "CUDA graph"}
UNSTEADY = 1.5
BUSY = 0.05
COLORS = {
    "joint": "#555555",
    "two_pass": "#d55e00",
    "reference": "#0072b2",
    "compiled": "#cc79a7",
    "composed": "#e69f00",
    "dgl_ext": "#009e73",
}

Row = dict[str, Any]


def _size(row: Row) -> str:
    return f"{row['batch']}x{row['width']}x{row['classes']}"


def _cell(row: Row) -> str:
    return f"{row['fusion']} {_size(row)}"


def _mode(row: Row) -> str:
    return row.get("mode", "eager")  # documents from before there were modes lack it


def _modes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(_mode(row) for row in rows))


def _by_mode(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each mode, with the mode's name; that is empty where all is eager."""
    modes = _modes(rows)
    plain = modes == ["eager"]
    return [
        ("" if plain else MODES[mode], [row for row in rows if _mode(row) == mode])
        for mode in modes
    ]


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, one table per fusion and mode, and the summary."""
    for line in _conditions(document):
        console.print(line, markup=False, highlight=False)
    rows = document["rows"]
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        for mode, here in _by_mode([row for row in rows if row["fusion"] == fusion]):
            console.print(_table(f"{fusion}, {mode}" if mode else fusion, here))
    for sentence in document["summary"]:
        console.print(f"* {sentence}", markup=False, highlight=False)


def _conditions(document: dict[str, Any]) -> list[str]:
    env, ceiling = document["environment"], document["ceiling"]
    return [
        f"{_machine(env)}; {document['dtype']}; torch {env['torch']}, dgl_ext {env['dgl_ext']}, "
        f"commit {env['git_sha']}, {env['date']}",
        f"measured ceiling: {ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s (matrix product), "
        f"{ceiling['bytes_per_second'] / 1e9:,.1f} GB/s (copy)",
        f"times and ratios: {document['statistic']}",
    ]


def _machine(env: dict[str, Any]) -> str:
    return env["gpu"] or f"{env['cpu']}, threads: {env['threads']}"


def _table(title: str, rows: list[Row]) -> Table:
    """One block of lines per size; fits 80 columns."""
    counted = any(row.get("launches") is not None for row in rows)
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("B x D x C", no_wrap=True)
    names = ("us", "p20-p80", "/joint", "/two_pass", "rate", "ceiling")
    for name in (*names, "kernels") if counted else names:
        table.add_column(name, justify="right", no_wrap=True)
    size = None
    for row in rows:
        if size != _size(row):
            size = _size(row)
            table.add_row(size, style="bold")
        name = f"  {row['provider']}"
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
    for mode, here in _by_mode(rows):
        timed = [row for row in here if row["provider"] == subject and row["status"] == "ok"]
        where = f" ({mode})" if mode else ""
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
            modes = cells.setdefault((row["provider"], row["status"], row["note"]), {})
            modes.setdefault(_mode(row), []).append(_cell(row))
    total = len({_cell(row) for row in rows})
    verbs = {"left out": "was left out", "wrong": "is wrong", "failed": "failed"}
    sentences = []
    for (provider, status, note), modes in cells.items():
        places = {MODES[mode]: where for mode, where in modes.items()}
        first = next(iter(modes.values()))
        if len(modes) == len(_modes(rows)) and all(where == first for where in modes.values()):
            places = {"": first}  # no matter in which mode
        for mode, where in places.items():
            sentences.append(
                f"{provider}{f' ({mode})' if mode else ''} {verbs[status]} at "
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
    if foreign_load is not None and foreign_load > BUSY:
        sentences.append(
            f"Busy: other processes took {foreign_load:.0%} of the CPUs while this was timed."
        )
    return sentences


def plot(path: Path, document: dict[str, Any]) -> None:
    """Draw each provider's time relative to joint (or its time, where joint was not timed)."""
    fusions = list(dict.fromkeys(row["fusion"] for row in document["rows"]))
    modes = _by_mode(document["rows"])
    names = list(dict.fromkeys(r["provider"] for r in document["rows"] if r["status"] == "ok"))
    figure, axes = pyplot.subplots(
        len(modes),
        len(fusions),
        figsize=(1 + 4.5 * len(fusions), 5 * len(modes)),
        sharey="row",
        squeeze=False,
    )
    for row_of_axes, (mode, rows) in zip(axes, modes, strict=True):
        _plot_mode(
            row_of_axes, mode, [row for row in rows if row["status"] == "ok"], fusions, names
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
        f"One training step by B x D x C, lower is better; median and p20 to p80 over rounds. "
        f"{_machine(env)}, {document['dtype']}, torch {env['torch']}, {env['date'][:10]}",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.04 / len(modes), 1, 1 - 0.06 / len(modes)))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_mode(axes: Any, mode: str, rows: list[Row], fusions: list[str], names: list[str]) -> None:
    """Draw the rows of one mode, one axis per fusion."""
    relative = all("ratio_to_joint" in row for row in rows)
    key = "ratio_to_joint" if relative else "median_us"
    low_key, high_key = (f"{key}_p20", f"{key}_p80") if relative else ("p20_us", "p80_us")
    for axis, fusion in zip(axes, fusions, strict=True):
        here = [row for row in rows if row["fusion"] == fusion]
        sizes = list(dict.fromkeys(_size(row) for row in here))
        for index, name in enumerate(names):
            mine = [row for row in here if row["provider"] == name]
            shift = (index - (len(names) - 1) / 2) * 0.14
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
                color=COLORS.get(name),
                label=name,
            )
        axis.set_title(f"{fusion}, {mode}" if mode else fusion)
        axis.set_xticks(range(len(sizes)), sizes, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        if relative:
            axis.axhline(1, color=COLORS["joint"], linewidth=0.8)
        else:
            axis.set_yscale("log")
    if relative:
        axes[0].set_ylim(0, 1.2 * max((row[key] for row in rows), default=1))
    axes[0].set_ylabel("time / time of joint" if relative else "microseconds a step")

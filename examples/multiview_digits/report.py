"""Tables and plot: means, deviations over seeds, and differences seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt

from .data import VIEWS
from .train import METHODS

DEFINITIONS = """Probe: a ridge classifier on the frozen features of an
encoder, fitted on the training rows. Some missing: each row lacks each view with probability 0.3,
in training and in test."""
FUSED = [name for name in METHODS if name != "untrained"]


def values(document: dict[str, Any], method: str, kind: str, key: str) -> list[float]:
    """One number of every seed, in the order of the seeds."""
    return [run[kind][key] for run in document["runs"] if run["method"] == method]


def std(numbers: Sequence[float]) -> float:
    """Sample deviation; 0 for one seed, which has none."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def difference(document: dict[str, Any], key: str, method: str) -> tuple[float, float]:
    """Mean of the fused accuracy minus that of joint, seed by seed, and its standard error."""
    mine, joint = (values(document, name, "fused", key) for name in (method, "joint"))
    gains = [a - b for a, b in zip(mine, joint, strict=True)]
    return statistics.fmean(gains), std(gains) / len(gains) ** 0.5


def cell(numbers: Sequence[float]) -> str:
    """`mean ± deviation`; a dash for nothing."""
    return f"{statistics.fmean(numbers):.1f} ± {std(numbers):.1f}" if numbers else "-"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is the header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fused_table(document: dict[str, Any]) -> str:
    """Fused accuracy of six views: all there, and some missing."""
    lines = [["method", "all there", "- joint", "some missing", "- joint"]]
    for method in FUSED:
        line = [METHODS[method]]
        for key in ("all", "missing"):
            gain = "{:+.1f} ± {:.1f}".format(*difference(document, key, method))
            numbers = values(document, method, "fused", key)
            line += [cell(numbers), "" if method == "joint" else gain]
        lines.append(line)
    return markdown(lines)


def probe_table(document: dict[str, Any]) -> str:
    """Probe of every encoder, by method; six views, all there."""
    lines = [["encoders of", *VIEWS]]
    for method, label in METHODS.items():
        lines.append([label, *(cell(values(document, method, "probes", v)) for v in VIEWS)])
    return markdown(lines)


def pair_table(document: dict[str, Any]) -> str:
    """Fused accuracy of every pair, by method, and DGL minus joint."""
    lines = [["pair", *(METHODS[method] for method in FUSED), "DGL - joint"]]
    for pair in document["pairs"]:
        cells = [cell(values(document, method, "fused", pair)) for method in FUSED]
        gain = "{:+.1f} ± {:.1f}".format(*difference(document, pair, "dgl"))
        lines.append([pair, *cells, gain])
    return markdown(lines)


def plot(document: dict[str, Any], path: Path) -> None:
    """Probes by view and method; pairs as DGL minus joint, in order."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for k, (method, label) in enumerate(METHODS.items()):
        numbers = [values(document, method, "probes", view) for view in VIEWS]
        left.errorbar(
            [i + 0.13 * (k - 2) for i in range(len(VIEWS))],
            [statistics.fmean(x) for x in numbers],
            yerr=[std(x) for x in numbers],
            fmt="osD^x"[k],
            color="grey" if method == "untrained" else f"C{k}",
            capsize=2,
            label=label,
        )
    left.set_xticks(range(len(VIEWS)), list(VIEWS), rotation=20)
    left.set_title("Probe of each encoder, six views, test accuracy in %")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    gains = sorted((*difference(document, pair, "dgl"), pair) for pair in document["pairs"])
    mean, error, names = zip(*gains, strict=True)
    right.errorbar(mean, range(len(names)), xerr=error, fmt="o", capsize=3)
    right.axvline(0, color="grey", linestyle=":")
    right.set_yticks(range(len(names)), names)
    right.set_title("Pairs: DGL - joint, fused, points ± standard error")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(document: dict[str, Any], out: Path) -> None:
    """Writes results.json, results.md and results.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    text = f"""# Results

Test accuracy in percent, mean ± standard deviation over {len(document["seeds"])} seeds
({", ".join(map(str, document["seeds"]))}). "- joint": mean of the differences to joint training
with the same seed, ± its standard error. {DEFINITIONS}

## Six views, fused

{fused_table(document)}

## Six views, probe of each encoder

{probe_table(document)}

## Pairs, fused

{pair_table(document)}

    {document["command"]}

{document["config"]};
{document["seconds"]} s with {document["workers"]} processes;
{document["versions"]}.
"""
    (out / "results.md").write_text(text)
    plot(document, out / "results.png")

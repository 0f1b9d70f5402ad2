"""The plots: accuracies, gradient norms over epochs, attenuation over epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import LABELS, METHODS
from .models import MODALITIES

BARS = {"fused": "fused", "probe_image": "image probe", "probe_audio": "audio probe"}
CURVES = ("joint", "ogm_ge", "regularised", "dgl_1", "dgl_4", "image", "audio")
DPI = 110


def accuracy(document: dict[str, Any]) -> Figure:
    """Mean and deviation of the fused accuracy and of the probes, one panel each."""
    summary = document["summary"]
    names = list(summary)[::-1]
    figure, panels = plt.subplots(1, len(BARS), figsize=(12, 4.5), sharey=True)
    for axes, (measure, title) in zip(panels, BARS.items(), strict=True):
        shown = [
            (row, summary[name][measure])
            for row, name in enumerate(names)
            if measure in summary[name]
        ]
        axes.errorbar(
            [value["mean"] for _, value in shown],
            [row for row, _ in shown],
            xerr=[value["std"] or 0 for _, value in shown],
            fmt="o",
            capsize=3,
        )
        if measure in summary.get("joint", {}):
            axes.axvline(summary["joint"][measure]["mean"], color="grey", linestyle=":")
        axes.set_title(f"{title}, test accuracy in %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    figure.suptitle(
        f"Mean and standard deviation over {len(document['seeds'])} seeds; dotted: joint training"
    )
    return figure


def draw_curves(axes: Axes, curves: dict[str, Any], modality: str) -> None:
    """One line per method that has this modality."""
    # A colour belongs to a method, whichever of the methods a panel shows.
    for number, name in enumerate(CURVES):
        curve = curves.get(name, {}).get(modality)
        if curve:
            epochs = range(1, len(curve) + 1)
            axes.plot(epochs, curve, color=f"C{number}", label=METHODS[name].label)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_title(f"{modality} encoder")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def curves(document: dict[str, Any], kind: str, title: str) -> Figure:
    """One panel per modality of curves over epochs."""
    figure, panels = plt.subplots(1, len(MODALITIES), figsize=(11, 4.2), sharey=True)
    for axes, modality in zip(panels, MODALITIES, strict=True):
        draw_curves(axes, document[kind], modality)
    figure.suptitle(title)
    return figure


def write(document: dict[str, Any], out: Path) -> None:
    """Writes accuracy.png, gradient_norms.png and attenuation.png."""
    figures = {
        "accuracy": accuracy(document),
        "gradient_norms": curves(
            document, "grad_norms", "Gradient norm of an encoder's parameters, mean of the steps"
        ),
        "attenuation": curves(
            document,
            "attenuation",
            "Attenuation: norm of the fused loss's gradient at a feature / of the unimodal loss's",
        ),
    }
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=DPI, metadata={"Software": None})
        plt.close(figure)

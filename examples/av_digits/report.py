"""The tables: means, deviations, paired differences, and the conditions under which they arose."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sklearn
import torch

import dgl_ext

from .data import DataConfig, load_pairs
from .measure import accuracy
from .methods import LABELS
from .models import MODALITIES
from .speech import espeak_version
from .train import Run, TrainConfig

BASELINE = "joint"

Measures = dict[str, list[float]]


Summary = dict[str, float | None]


def deviation(values: Sequence[float]) -> float | None:
    """Sample deviation; None for one value, which has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread(values: Sequence[float]) -> Summary:
    """Mean and sample deviation."""
    return {"mean": statistics.fmean(values), "std": deviation(values)}


def paired(values: Sequence[float], baseline: Sequence[float]) -> Summary | None:
    """Mean of the differences seed by seed, and its standard error; None without a baseline."""
    if not baseline:
        return None
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    std = deviation(differences)
    error = None if std is None else std / len(differences) ** 0.5
    return {"mean": statistics.fmean(differences), "standard_error": error}


def late_fusion(image: Run, audio: Run, digits: torch.Tensor) -> dict[str, float]:
    """Accuracies of the two late fusions of two networks that were trained apart."""
    fused = {
        "late_logits": image.logits + audio.logits,
        "late_mean": image.logits.softmax(1) + audio.logits.softmax(1),
    }
    return {name: accuracy(scores, digits) for name, scores in fused.items()}


def collect(runs: Sequence[Run], data: DataConfig, cache: Path) -> dict[str, Measures]:
    """Per method and measure the values of all seeds, in one order."""
    values: dict[str, Measures] = {}
    for run in runs:
        measures = values.setdefault(run.method, {})
        measures.setdefault("fused", []).append(run.fused)
        for modality in run.probes:
            measures.setdefault(f"probe_{modality}", []).append(run.probes[modality])
            measures.setdefault(f"zeroed_{modality}", []).append(run.zeroed[modality])
    by_key = {(run.method, run.seed): run for run in runs}
    for seed in dict.fromkeys(run.seed for run in runs):
        image, audio = by_key.get(("image", seed)), by_key.get(("audio", seed))
        if image and audio:
            digits = load_pairs(data, seed, cache)["test"].digits
            for name, value in late_fusion(image, audio, digits).items():
                values.setdefault(name, {}).setdefault("fused", []).append(value)
    return values


def mean_curves(runs: Sequence[Run], kind: str) -> dict[str, dict[str, list[float]]]:
    """Per method and modality a curve over epochs, averaged over the seeds that stayed finite."""
    curves: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys(run.method for run in runs):
        of_seeds = [getattr(run, kind) for run in runs if run.method == name and not run.diverged]
        if not of_seeds:
            continue
        curves[name] = {
            modality: [
                statistics.fmean(epoch)
                for epoch in zip(*(curve[modality] for curve in of_seeds), strict=True)
            ]
            for modality in of_seeds[0]
        }
    return curves


def make(
    runs: Sequence[Run],
    data: DataConfig,
    config: TrainConfig,
    cache: Path,
    command: str,
    seconds: float,
) -> dict[str, Any]:
    """Everything that is measured, with its conditions, as one document for JSON."""
    values = collect(runs, data, cache)
    baseline = values.get(BASELINE, {})
    summary = {}
    for name in [name for name in LABELS if name in values]:
        summary[name] = {
            measure: {
                **spread(series),
                "minus_joint": paired(series, baseline.get(measure, [])),
            }
            for measure, series in values[name].items()
        }
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "versions": {
            "dgl_ext": dgl_ext.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "espeak-ng": espeak_version().split()[-1],
            "python": platform.python_version(),
        },
        "cpus": os.cpu_count(),
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs)),
        "load": round(os.getloadavg()[2], 1),
        "data": asdict(data),
        "training": asdict(config),
        "summary": summary,
        "grad_norms": mean_curves(runs, "grad_norms"),
        "attenuation": mean_curves(runs, "attenuation"),
        "runs": [run.document() for run in runs],
    }


def plus_minus(width: float | None) -> str:
    """The second half of a cell; nothing for a single seed."""
    return "" if width is None else f" ± {width:.1f}"


def cell(summary: dict[str, Any], measure: str) -> str:
    """`mean ± deviation`, or a dash."""
    value = summary.get(measure)
    return f"{value['mean']:.1f}{plus_minus(value['std'])}" if value else "-"


def difference(summary: dict[str, Any], measure: str) -> str:
    """`mean difference ± its standard error`, or a dash."""
    value = (summary.get(measure) or {}).get("minus_joint")
    return f"{value['mean']:+.1f}{plus_minus(value['standard_error'])}" if value else "-"


def table(document: dict[str, Any]) -> str:
    """The main table in Markdown."""
    probes = [f"probe_{modality}" for modality in MODALITIES]
    zeroed = [f"zeroed_{modality}" for modality in MODALITIES]
    header = ["method", "fused", "- joint"]
    header += [text for name in MODALITIES for text in (f"{name} probe", "- joint")]
    header += [f"{name}, other zeroed" for name in MODALITIES]
    lines = [header, ["---"] * len(header)]
    for name, summary in document["summary"].items():
        line = [LABELS[name], cell(summary, "fused")]
        line.append("" if name == BASELINE else difference(summary, "fused"))
        for probe in probes:
            line += [cell(summary, probe)]
            line += ["" if name == BASELINE else difference(summary, probe)]
        # Of a network with one encoder nothing is zeroed.
        alone = name in MODALITIES
        line += ["-" if alone else cell(summary, measure) for measure in zeroed]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def divergence(document: dict[str, Any]) -> list[str]:
    """Names the runs that diverged, if there are any."""
    names = [
        f"{LABELS[run['method']]}, seed {run['seed']}"
        for run in document["runs"]
        if run["diverged"]
    ]
    if not names:
        return []
    return [
        f"- Diverged, weights no longer finite: {'; '.join(names)}. In the table such a run counts "
        "with the accuracy of a constant answer; the curves leave it out."
    ]


def conditions(document: dict[str, Any]) -> str:
    """How the numbers were made."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    seeds = document["seeds"]
    return "\n".join(
        [
            f"    {document['command']}",
            "",
            f"- {len(seeds)} seeds: {', '.join(map(str, seeds))}. Date: {document['date']}. "
            f"Wall time: {document['seconds']} s; time on the CPU of all runs together: "
            f"{document['cpu_seconds']} s.",
            f"- Machine: {document['cpus']} CPUs, load average over the last 15 minutes "
            f"{document['load']}. Above the number of CPUs, the runs waited for others.",
            f"- {versions}.",
            f"- Data: `{document['data']}`.",
            f"- Training: `{document['training']}`.",
            *divergence(document),
        ]
    )


def write(document: dict[str, Any], out: Path) -> None:
    """Writes results.json and results.md."""
    (out / "results.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    text = f"""# Results

Test accuracy in percent. "±" after a mean: standard deviation over seeds. "- joint": mean over
seeds of the difference to joint training with the same seed, ± its standard error. Probe: a linear
classifier on the trained encoder's features. "Other zeroed": the network's own head, with zeros
for the other modality's feature.

{table(document)}

{conditions(document)}
"""
    (out / "results.md").write_text(text)

"""Times whole training steps: two encoders, a fusion head, losses, backward pass, optimiser.

    python benchmarks/bench_training.py                     # small CNNs, every fusion, 10 minutes
    python benchmarks/bench_training.py --networks resnet18 --batch 8
    python benchmarks/bench_training.py --smoke             # does it all still run?

This is what a user of the method sees, where `bench_fusion.py` shows the head alone. Providers:

    joint       plain joint training, one loss: what training costs without DGL
    two_pass    the published DGL recipe: two backward passes, head grads dropped in between
    dgl_ext     dgl_ext.nn.*.cross_entropy and one backward pass

Networks: "digits", the small CNNs of examples/av_digits; "resnet18", the encoders
of examples/crema_d on 257 x 188 spectrograms and 224 x 224 frames.

Before anything is timed, the losses and all gradients of dgl_ext are compared with those of
two_pass, and joint's loss with the fused one; a provider that differs is not timed. Times are
medians over rounds in which all providers take turns; ratios are taken within a round
(`harness.py` says how and why). Peak memory is what a step takes beyond what was there before it
(weights, the optimiser's state, the batch): in a fresh process the median of several steps, and of
three such processes the median (`peak_memory.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch

try:
    import harness
    import options as options_of
    import providers
    import report
    import training_child
    import training_steps
    from problems import FUSIONS
    from report import Row
    from rich.console import Console
except ImportError as error:
    sys.exit(f"bench_training needs dgl_ext and rich installed: {error}")

PROCESSES = 9  # fresh ones, for the peak memory of one provider
MIB = 2**20
REPETITIONS = 7  # steps in each
BASELINES = ("joint", "two_pass")
# Relative to the largest value of a tensor; rounding in encoders is amplified by their depth.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Cell:
    """One network with one head."""

    network: str
    fusion: str
    batch: int
    device: torch.device
    dtype_name: str

    def __str__(self) -> str:
        return f"{self.network} {self.fusion}, batch {self.batch}"

    def training(self) -> training_steps.Training:
        dtype = getattr(torch, self.dtype_name)
        return training_steps.Training(self.network, self.fusion, self.batch, self.device, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a provider was wrong or crashed."""
    options = _parse(arguments)
    console = report.make_console()
    cells = [
        Cell(network, fusion, options.batch, options.device, options.dtype_name)
        for network in options.networks
        for fusion in options.fusion
    ]
    load = harness.ForeignLoad()
    rows: list[Row] = []
    with report.CellProgress(console, len(cells)) as progress:
        for cell in cells:
            rows += measure(
                cell, options.seconds, options.processes, load, progress.begin(str(cell))
            )
    document = {
        "benchmark": "training",
        "step": "encoders, head, losses, backward pass, SGD with momentum",
        "statistic": harness.STATISTIC,
        "memory": "bytes at a step's peak beyond those before it; median of fresh processes",
        "device": str(options.device),
        "dtype": options.dtype_name,
        "seconds_per_cell": options.seconds,
        "environment": harness.environment(options.device),
        "foreign_load": load.share,
        "summary": describe(rows, load.share),
        "rows": rows,
    }
    print_results(console, document)
    for path in report.write(options.out, "training", document, columns(), smoke=options.smoke):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def measure(
    cell: Cell,
    seconds: float,
    processes: int,
    load: harness.ForeignLoad,
    on_share: Any = None,
) -> list[Row]:
    """Check, time and weigh every provider at one cell; one row each."""
    steps, excluded = right_steps(cell)
    rounds: dict[str, list[float]] = {}
    if steps:
        with load:
            rounds = harness.time_alternating(steps, cell.device, seconds, on_round=on_share)
    del steps
    rows = []
    for name in training_steps.PROVIDERS:
        status, note = excluded.get(name, ("ok", ""))
        row: Row = {"network": cell.network, "fusion": cell.fusion, "batch": cell.batch}
        row |= {"provider": name, "status": status, "note": note}
        if status == "ok":
            row |= _times(name, rounds) | _memory(cell, name, processes)
        rows.append(row)
    by_name = {row["provider"]: row for row in rows}
    for row in rows:
        for other in BASELINES:
            if "peak_bytes" in row and "peak_bytes" in by_name[other]:
                ratio = row["peak_bytes"] / by_name[other]["peak_bytes"]
                row[f"peak_ratio_to_{other}"] = ratio
    return rows


def right_steps(
    cell: Cell,
) -> tuple[dict[str, training_steps.Step], dict[str, tuple[str, str]]]:
    """The steps whose results are right; status and note of the others."""
    steps, losses, gradients = {}, {}, {}
    excluded: dict[str, tuple[str, str]] = {}
    for name, build in training_steps.PROVIDERS.items():
        try:
            training = cell.training()
            step = build(training)
            losses[name] = step()
            gradients[name] = training.gradients()
            steps[name] = step
        except providers.Unavailable as why:
            excluded[name] = ("left out", str(why))
        except Exception as error:  # the others are still worth timing
            excluded[name] = ("failed", providers.reason(error))
    if "two_pass" in steps:
        tolerance = TOLERANCE[cell.dtype_name]
        truth = {f"loss[{i}]": loss for i, loss in enumerate(losses["two_pass"])}
        truth |= gradients["two_pass"]
        for name in [name for name in steps if name != "two_pass"]:
            found = {f"loss[{i}]": loss for i, loss in enumerate(losses[name])}
            if name != "joint":  # which computes other gradients on purpose
                found |= gradients[name]
            expected = truth if name != "joint" else {"loss[0]": truth["loss[0]"]}
            wrong = difference(found, expected, tolerance)
            if wrong:
                excluded[name] = ("wrong", wrong)
                del steps[name]
    return steps, excluded


def difference(
    found: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor | None],
    tolerance: float,
) -> str:
    """Says how results differ; empty where they agree."""
    if found.keys() != expected.keys():
        return f"results: expected {', '.join(expected)}, got {', '.join(found)}"
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            if value is not other:
                return f"{name}: one has a gradient, the other has none"
            continue
        scale = value.double().abs().max().item()
        error = (other.double() - value.double()).abs().max().item()
        if not error <= tolerance * scale:
            return f"{name}: differs by {error:.3g} from values up to {scale:.3g}"
    return ""


def _times(name: str, rounds: dict[str, list[float]]) -> Row:
    times = harness.spread(rounds[name])
    row: Row = {"rounds": len(rounds[name]), "median_us": times.median}
    row |= {"p20_us": times.p20, "p80_us": times.p80}
    for other in BASELINES:
        if other in rounds:
            ratio = harness.paired_ratio(rounds[name], rounds[other])
            key = f"ratio_to_{other}"
            row |= {key: ratio.median, f"{key}_p20": ratio.p20, f"{key}_p80": ratio.p80}
    return row


def _memory(cell: Cell, name: str, processes: int) -> Row:
    request = training_child.Request(
        provider=name,
        network=cell.network,
        fusion=cell.fusion,
        batch=cell.batch,
        device=str(cell.device),
        dtype=cell.dtype_name,
        threads=torch.get_num_threads(),
        repetitions=REPETITIONS,
    )
    peaks = []
    for _ in range(processes):
        answer = training_child.ask(request)
        if "peaks" not in answer:
            return {"note": f"memory not measured: {answer['note']}"}
        peaks.append(statistics.median(answer["peaks"]))
    return {
        "peak_bytes": round(statistics.median(peaks)),
        "peak_bytes_min": round(min(peaks)),
        "peak_bytes_max": round(max(peaks)),
    }


def columns() -> list[str]:
    """Of the CSV file."""
    names = ["network", "fusion", "batch", "provider", "status", "note", "rounds"]
    names += ["median_us", "p20_us", "p80_us"]
    names += [f"ratio_to_{other}{part}" for other in BASELINES for part in ("", "_p20", "_p80")]
    names += ["peak_bytes", "peak_bytes_min", "peak_bytes_max"]
    return names + [f"peak_ratio_to_{other}" for other in BASELINES]


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, the table and the summary."""
    table = report.make_table(
        document["rows"],
        "",
        _cell,
        [
            ("ms", lambda row: f"{row['median_us'] / 1e3:.2f}"),
            ("p20-p80", lambda row: f"{row['p20_us'] / 1e3:.2f}-{row['p80_us'] / 1e3:.2f}"),
            *((f"/{other}", report.ratio(f"ratio_to_{other}", 3)) for other in BASELINES),
            ("MiB", lambda row: f"{row['peak_bytes'] / MIB:.1f}" if "peak_bytes" in row else "-"),
            *((f"/{other}", report.ratio(f"peak_ratio_to_{other}", 3)) for other in BASELINES),
        ],
    )
    details = (f"times and ratios: {document['statistic']}", f"memory: {document['memory']}")
    report.print_results(console, document, details, [table])


def describe(rows: list[Row], foreign_load: float | None) -> list[str]:
    """Say in words what the rows show, where dgl_ext is worse included."""
    return [
        *report.compare(rows, _cell),
        *report.compare(rows, _cell, "peak_ratio", "times the memory at its peak"),
        *report.not_measured(rows, _cell),
        *report.noise(rows, foreign_load),
    ]


def _cell(row: Row) -> str:
    return f"{row['network']} {row['fusion']}, batch {row['batch']}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fusions = ",".join(FUSIONS)
    parser.add_argument(
        "--networks",
        type=options_of.some_of(training_steps.NETWORKS),
        default="digits",
        help="some of " + ",".join(training_steps.NETWORKS) + "; default digits",
    )
    parser.add_argument(
        "--fusion", type=options_of.some_of(FUSIONS), default=fusions, help=f"default {fusions}"
    )
    parser.add_argument("--batch", type=options_of.counts, help="rows, default 64")
    parser.add_argument(
        "--seconds", type=options_of.positive("seconds"), help="timing per cell, default 20"
    )
    options_of.add_common(parser)
    options = parser.parse_args(arguments)
    batch = options.batch or [6 if options.smoke else 64]
    if len(batch) != 1:
        parser.error(f"argument --batch: expected one number of rows, got {len(batch)}")
    options.batch = batch[0]
    options.seconds = options.seconds or (0.1 if options.smoke else 20.0)
    options.processes = 1 if options.smoke else PROCESSES
    options_of.complete(parser, options)
    return options


if __name__ == "__main__":
    sys.exit(main())

"""Times one training step of a fusion head: disentangled gradient learning against its rivals.

    python benchmarks/bench_fusion.py                  # every fusion and size, some minutes
    python benchmarks/bench_fusion.py --smoke          # tiny sizes: does it all still run?
    python benchmarks/bench_fusion.py --fusion concat,sum --sizes 64x512x6 --seconds 20

A step goes from leaf features to all gradients of features and head: forward, cross-entropy,
backward, with every gradient None at the start. Two modalities of equal width. Providers:

    joint               plain joint training, one loss: what a head costs without DGL
    two_pass            the published DGL recipe: two backward passes, head grads cleared between
    reference           dgl_ext.reference, plain PyTorch, one backward pass
    compiled            torch.compile of the reference and its losses (compile time not counted)
    dgl_ext             dgl_ext.fused_decouple; on CUDA with backend="cuda"

On CUDA each provider is timed twice, in turns with all others: called from Python ("eager"), and
as one CUDA graph of the whole step ("graph"), which takes the host's time out of the figure.
`--graphs` chooses. Ratios are between providers in the same mode. The kernels of a step are
counted by torch.profiler after all timing.

Before anything is timed, all logits and gradients, also those that a replayed graph writes, are
compared with the reference in the same dtype; a provider that differs is not timed. For `joint`,
which computes other gradients on purpose, the fused logits are compared.

Times are medians over rounds in which all providers take turns; ratios are taken within a round.
`harness.py` says how and why. The cells are visited three times, a third of the rounds each, so
that a slow minute of the machine does not make up a whole cell. The rates count the work that no
implementation can avoid (`least_work` in `providers.py`), the same for all DGL providers. The
table's last column, "ceiling", relates a step to the machine: the time in which the measured GEMM
and copy rates could do that least work, as a share of the step's time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

try:
    import cuda_steps
    import fusion_cells
    import fusion_report
    import harness
    import providers
    import report
except ImportError as error:
    sys.exit(f"bench_fusion needs dgl_ext, rich and matplotlib installed: {error}")

SIZES = "64x512x6,64x512x34,64x512x309,256x512x309,256x1024x1000,1024x2048x1000"
CUDA_SIZES = f"{SIZES},4096x2048x1000"
SMOKE_SIZES = "33x64x34"
PASSES = 3
DTYPES = ("float64", "float32", "bfloat16", "float16")
MODES = {
    "eager": (fusion_cells.EAGER,),
    "graphs": (fusion_cells.GRAPH,),
    "both": (fusion_cells.EAGER, fusion_cells.GRAPH),
}
DEFAULT_OUT = Path(__file__).parent / "results"

Size = tuple[int, int, int]  # batch, width, classes


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a provider was wrong or crashed."""
    options = _parse(arguments)
    console = report.make_console()
    console.print(f"measuring the ceiling of {options.device} in {options.dtype_name} ...")
    ceiling = harness.measure_ceiling(options.device, options.dtype, quick=options.smoke)
    gpu = _gpu(options.device)
    timings = {
        fusion_cells.Cell(fusion, size, options.device, options.dtype): fusion_cells.Timing(
            options.providers, MODES[options.graphs]
        )
        for fusion in options.fusion
        for size in options.sizes
    }
    load = harness.ForeignLoad()
    passes = 1 if options.smoke else PASSES
    with report.CellProgress(console, passes * len(timings)) as progress:
        for _ in range(passes):
            for cell, timing in timings.items():
                on_share = progress.begin(str(cell))
                fusion_cells.measure(
                    cell,
                    timing,
                    options.seconds / passes,
                    min_rounds=math.ceil(harness.MIN_ROUNDS / passes),
                    load=load,
                    on_share=on_share,
                    gpu=gpu,
                )
    if gpu is not None:
        console.print("counting kernels ...")
        for cell, timing in timings.items():
            fusion_cells.count_launches(cell, timing, gpu)
    rows = [
        row for cell, timing in timings.items() for row in fusion_cells.rows(cell, timing, ceiling)
    ]

    document = {
        "benchmark": "fusion",
        "step": "logits, three cross-entropies (joint: one), backward",
        "statistic": harness.STATISTIC,
        "device": str(options.device),
        "dtype": options.dtype_name,
        "modes": list(MODES[options.graphs]),
        "seconds_per_cell": options.seconds,
        "environment": harness.environment(options.device),
        "ceiling": asdict(ceiling),
        "foreign_load": load.share,
        "summary": fusion_report.describe(rows, foreign_load=load.share),
        "rows": rows,
    }
    fusion_report.print_results(console, document)
    for path in write_results(options.out, document, smoke=options.smoke):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def _gpu(device: torch.device) -> cuda_steps.Gpu | None:
    return cuda_steps.Gpu(device) if device.type == "cuda" else None


def write_results(out: Path, document: dict[str, Any], *, smoke: bool) -> list[Path]:
    """Write JSON, CSV and plot, named by device and dtype; returns the paths."""
    kind = torch.device(document["device"]).type
    stem = f"bench_fusion_{kind}_{document['dtype']}" + ("_smoke" if smoke else "")
    paths = [out / f"{stem}.{ending}" for ending in ("json", "csv", "png")]
    report.write_json(paths[0], document)
    report.write_csv(paths[1], fusion_cells.columns(), document["rows"])
    fusion_report.plot(paths[2], document)
    return paths


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fusions, names = ",".join(providers.FUSIONS), ",".join(providers.PROVIDERS)
    parser.add_argument(
        "--fusion", type=_some_of(providers.FUSIONS), default=fusions, help=f"default {fusions}"
    )
    parser.add_argument(
        "--sizes", type=_sizes, help=f"batch x width x classes, default {CUDA_SIZES} (last: CUDA)"
    )
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", dest="dtype_name")
    parser.add_argument(
        "--providers", type=_some_of(providers.PROVIDERS), default=names, help=f"default {names}"
    )
    parser.add_argument(
        "--graphs",
        choices=MODES,
        help="on CUDA: Python calls (eager), CUDA graphs, or both (default); on the CPU: eager",
    )
    parser.add_argument("--seconds", type=_positive, help="timing per cell, default 8")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder, default benchmarks/results"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and little time")
    options = parser.parse_args(arguments)
    on_cuda = options.device.type == "cuda"
    options.graphs = options.graphs or ("both" if on_cuda else "eager")
    if options.graphs != "eager" and not on_cuda:
        parser.error(
            f"argument --graphs: expected eager on {options.device}, since CUDA graphs need "
            f"--device cuda; got {options.graphs!r}"
        )
    default_sizes = CUDA_SIZES if on_cuda else SIZES
    options.sizes = options.sizes or _sizes(SMOKE_SIZES if options.smoke else default_sizes)
    options.seconds = options.seconds or (0.2 if options.smoke else 8.0)
    options.dtype = getattr(torch, options.dtype_name)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder: {error}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: cannot write to {options.out}")
    return options


def _some_of(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.split(",")))
        for name in chosen:
            if name not in allowed:
                expected = ", ".join(allowed)
                raise argparse.ArgumentTypeError(f"expected some of {expected}; got {name!r}")
        return chosen

    return parse


def _sizes(text: str) -> list[Size]:
    sizes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise argparse.ArgumentTypeError(
                f"expected batch x width x classes as in 64x512x6,256x512x309; got {part!r}"
            )
        sizes.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return list(dict.fromkeys(sizes))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0; got {text!r}")
    return value


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N; got {text!r}")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise argparse.ArgumentTypeError(f"torch sees {found} CUDA devices here; got {text!r}")
    return device


if __name__ == "__main__":
    sys.exit(main())

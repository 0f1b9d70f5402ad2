"""Times one training step of a fusion head: disentangled gradient learning against its rivals.

    python benchmarks/bench_fusion.py                  # every fusion and size, some minutes
    python benchmarks/bench_fusion.py --smoke          # tiny sizes, both modes: does it still run?
    python benchmarks/bench_fusion.py --mode logits    # the head that hands out its logits
    python benchmarks/bench_fusion.py --fusion concat,sum --sizes 64x512x6 --seconds 20

A step goes from leaf features to all gradients of features and head: forward, cross-entropy,
backward, with every gradient None at the start. Two modalities of equal width. Providers:

    joint                 plain joint training, one loss: what a head costs without DGL
    two_pass              the published DGL recipe: two backward passes, head grads cleared between
    reference             dgl_ext.reference, plain PyTorch, one backward pass
    compiled              torch.compile of the reference and its losses (compiling not counted)
    linear_cross_entropy  three calls of torch's linear_cross_entropy, in chunks (mode step)
    liger                 three calls of Liger's fused linear cross-entropy (mode step), where
                          liger-kernel is installed; CUDA only, and no CUDA graph, for it waits
    dgl_ext_logits        dgl_ext.fused_decouple and three F.cross_entropy (mode step)
    fused                 dgl_ext with backend="fused", one launch of its kernels; CUDA only
    library               dgl_ext with backend="library", cuBLAS and kernels between; CUDA only
    dgl_ext               dgl_ext.fused_decouple_cross_entropy, backend="auto"

In mode "step" a step hands out its losses; reference and dgl_ext, which then are the package's
training step, count top-1 hits too. In mode "logits" a step hands out the logits of all branches;
reference and dgl_ext are fused_decouple with an F.cross_entropy per branch. `--dtype tf32` is
float32 whose products on CUDA may be tf32, in every provider.

On CUDA each provider is timed twice, in turns with all others: called from Python ("eager"), and
as one CUDA graph of the whole step ("graph"), which takes the host's time out of the figure.
`--graphs` chooses. Ratios are between providers that are executed alike. The kernels of a step are
counted by torch.profiler after all timing.

Before anything is timed, all losses (or logits) and gradients, also those that a replayed graph
writes, are compared with the reference in float64; a provider that differs is not timed. For
`joint`, which computes other gradients on purpose, the output of the fused branch is compared.

Times are medians over rounds in which all providers take turns; ratios are taken within a round.
`harness.py` says how and why. The cells are visited three times, a third of the rounds each, so
that a slow minute of the machine does not make up a whole cell. The rates count the work that no
implementation can avoid (`least_work` in `problems.py`), the same for all DGL providers. The
table's last column, "ceiling", relates a step to the machine: the time in which the measured GEMM
and copy rates could do that least work, as a share of the step's time.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from typing import Any

import torch

try:
    import cuda_steps
    import fusion_cells
    import fusion_report
    import harness
    import options as shared
    import problems
    import providers
    import report
    from rich.console import Console
except ImportError as error:
    sys.exit(f"bench_fusion needs dgl_ext, rich and matplotlib installed: {error}")

SIZES = "64x512x6,64x512x34,64x512x309,256x512x309,256x1024x1000,1024x2048x1000"
CUDA_SIZES = f"{SIZES},4096x2048x1000"
SMOKE_SIZES = "33x64x34"
PASSES = 3
WHAT = {
    providers.STEP: "features in, losses and all gradients out",
    providers.LOGITS: "logits, three cross-entropies (joint: one), backward",
}
EXECUTIONS = {
    "eager": (fusion_cells.EAGER,),
    "graphs": (fusion_cells.GRAPH,),
    "both": (fusion_cells.EAGER, fusion_cells.GRAPH),
}

Size = tuple[int, int, int]  # batch, width, classes


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a provider was wrong or crashed."""
    options = _parse(arguments)
    console = report.make_console()
    console.print(f"measuring the ceiling of {options.device} in {options.dtype_name} ...")
    ceiling = harness.measure_ceiling(options.device, options.dtype, quick=options.smoke)
    statuses = set()
    for mode in options.modes:
        document = _run(mode, options, ceiling, console)
        fusion_report.print_results(console, document)
        paths = report.write(
            options.out,
            f"fusion_{mode}",
            document,
            fusion_cells.columns(mode),
            smoke=options.smoke,
            plot=fusion_report.plot,
        )
        for path in paths:
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
        statuses |= {row["status"] for row in document["rows"]}
    return int(bool(statuses & {"wrong", "failed"}))


def _run(
    mode: str, options: argparse.Namespace, ceiling: harness.Ceiling, console: Console
) -> dict[str, Any]:
    """Measure every cell in one mode; returns the result document."""
    gpu = _gpu(options.device)
    executions = EXECUTIONS[options.graphs]
    timings = {
        fusion_cells.Cell(mode, fusion, size, options.device, options.dtype): fusion_cells.Timing(
            options.providers or list(providers.PROVIDERS[mode]), executions
        )
        for fusion in options.fusion
        for size in options.sizes
    }
    load = harness.ForeignLoad()
    passes = options.passes
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
    return {
        "benchmark": "fusion",
        "mode": mode,
        "step": WHAT[mode],
        "statistic": harness.STATISTIC,
        "device": str(options.device),
        "dtype": options.dtype_name,
        "executions": list(executions),
        "seconds_per_cell": options.seconds,
        "environment": harness.environment(options.device),
        "ceiling": asdict(ceiling),
        "foreign_load": load.share,
        "summary": fusion_report.describe(rows, load.share),
        "rows": rows,
    }


def _gpu(device: torch.device) -> cuda_steps.Gpu | None:
    return cuda_steps.Gpu(device) if device.type == "cuda" else None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fusions, names = ",".join(problems.FUSIONS), list(providers.PROVIDERS[providers.STEP])
    parser.add_argument(
        "--mode", choices=WHAT, help="what a step hands out, default step; with --smoke both"
    )
    parser.add_argument(
        "--fusion",
        type=shared.some_of(problems.FUSIONS),
        default=fusions,
        help=f"default {fusions}",
    )
    parser.add_argument(
        "--sizes", type=_sizes, help=f"batch x width x classes, default {CUDA_SIZES} (last: CUDA)"
    )
    parser.add_argument(
        "--providers",
        type=shared.some_of(names),
        help=f"default {','.join(names)}, of these what the mode has",
    )
    parser.add_argument(
        "--graphs",
        choices=EXECUTIONS,
        help="on CUDA: Python calls (eager), CUDA graphs, or both (default); on the CPU: eager",
    )
    parser.add_argument(
        "--seconds", type=shared.positive("seconds"), help="timing per cell, default 8"
    )
    parser.add_argument(
        "--passes", type=shared.whole, help=f"visits of a cell, default {PASSES}, with --smoke 1"
    )
    shared.add_common(parser, (*shared.DTYPES, shared.TF32))
    options = parser.parse_args(arguments)
    options.modes = [options.mode] if options.mode else [providers.STEP]
    if options.smoke and not options.mode:
        options.modes = list(WHAT)
    for mode in options.modes:
        lacking = [
            name for name in options.providers or () if name not in providers.PROVIDERS[mode]
        ]
        if lacking:
            parser.error(
                f"argument --providers: expected some of {', '.join(providers.PROVIDERS[mode])} "
                f"in mode {mode}; got {lacking[0]!r}"
            )
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
    options.passes = options.passes or (1 if options.smoke else PASSES)
    shared.complete(parser, options)
    return options


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


if __name__ == "__main__":
    sys.exit(main())

"""Measures the peak memory and the time of a training step over rows x classes.

    python benchmarks/bench_memory.py                      # up to 16,384 x 32,000, many minutes
    python benchmarks/bench_memory.py --smoke              # one small size: does it all still run?
    python benchmarks/bench_memory.py --rows 4096,16384 --classes 32000 --limit 128

A step goes from leaf features to all gradients of features and head, with every gradient None at
the start: concat, two modalities of one width (`--width`, 512). The providers are those of
`bench_fusion.py` in mode step that say something about memory:

    joint                 plain joint training, one loss: the logits exist whole
    dgl_ext_logits        dgl_ext.fused_decouple and three F.cross_entropy: so do those of all three
    linear_cross_entropy  three calls of torch's linear_cross_entropy, in chunks of torch's choice
    liger                 three calls of Liger's fused linear cross-entropy, where liger-kernel is
                          installed; CUDA only
    fused                 dgl_ext with backend="fused", one launch of its kernels; CUDA only
    library               dgl_ext with backend="library", cuBLAS and kernels between; CUDA only
    dgl_ext               dgl_ext.fused_decouple_cross_entropy, backend="auto"

"extra" is the memory at the peak of a step beyond what there was before it, when the inputs were
there. It holds the gradients, which the caller keeps; "rest" is extra less these, and is to be
compared with the workspace limit (`--limit`, see `dgl_ext.set_workspace_limit`). Each figure comes
from a process of its own; `memory_child.py` says how. On the CPU, where the peak is that of the
resident set, the rest also holds some MiB of the GEMM library's buffers.

The time is the median of the steps after the one whose peak was taken, for `--seconds`, at least
one. Providers have processes of their own, so they do not take turns: for small sizes the ratios
of `bench_fusion.py` are the better ones.

Before anything is measured, losses and gradients at the smallest size, in chunks, are compared with
the reference in float64. What would not fit into the memory that is free is skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import fusion_cells
    import harness
    import memory_child
    import options as shared
    import providers
    import report
    from report import Row
    from rich.console import Console

    import dgl_ext
except ImportError as error:
    sys.exit(f"bench_memory needs dgl_ext and rich installed: {error}")

ROWS, CLASSES = "1024,4096,16384", "1000,8000,32000"
SMOKE_ROWS, SMOKE_CLASSES, SMOKE_LIMIT = "256", "1000", 1.0
WIDTH = 512
MIB = 2**20
LIMITS = {"cpu": 64.0, "cuda": 512.0}  # MiB, the package's defaults

# How many arrays of rows x classes a step holds at its peak: the logits of a branch, then their
# log-softmax, which autograd keeps, then two gradients of one branch at a time.
PLANES = {
    "joint": 3,
    "dgl_ext_logits": 6,
    "linear_cross_entropy": 0,
    "liger": 0,
    "fused": 0,
    "library": 0,
    "dgl_ext": 0,
}
USABLE = 0.9  # of the memory that is free


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a provider was wrong or crashed."""
    options = _parse(arguments)
    console = report.make_console()
    cells = [(rows, classes) for rows in options.rows for classes in options.classes]
    smallest = min(cells, key=lambda cell: cell[0] * cell[1])
    console.print(f"comparing results at {_cell(*smallest)} ...")
    excluded = check(*smallest, options)

    load, rows = harness.ForeignLoad(), []
    with report.CellProgress(console, len(cells) * len(options.providers)) as progress:
        for cell in cells:
            here = []
            for name in options.providers:
                done = progress.begin(f"{_cell(*cell)} {name}")
                with load:
                    here.append(measure(name, *cell, options, excluded))
                done(1)
            rows += with_ratios(here)

    document = {
        "benchmark": "memory",
        "step": "concat, two modalities: features in, losses and all gradients out",
        "statistic": "peak of one step; median (p20, p80) of the steps after it",
        "device": str(options.device),
        "dtype": options.dtype_name,
        "width": options.width,
        "workspace_limit": options.limit,
        "environment": harness.environment(options.device),
        "foreign_load": load.share,
        "summary": describe(rows, options.limit, load.share),
        "rows": rows,
    }
    print_results(console, document)
    for path in report.write(options.out, "memory", document, columns(), smoke=options.smoke):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def check(rows: int, classes: int, options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Compare all providers with the reference; returns status and note of those to leave out."""
    size = (rows, options.width, classes)
    cell = fusion_cells.Cell(
        providers.STEP, memory_child.FUSION, size, options.device, options.dtype
    )
    timing = fusion_cells.Timing(options.providers)
    # The smallest size may fit the limit whole, but the chunks are what is to be checked.
    planes = 3 * rows * classes * options.dtype.itemsize
    before = dgl_ext.set_workspace_limit(min(options.limit, max(1, planes // 4)))
    try:
        fusion_cells.right_steps(cell, timing, None)
    finally:
        dgl_ext.set_workspace_limit(before)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # the children need it, and what is free is asked for
    return {candidate.provider: verdict for candidate, verdict in timing.excluded.items()}


def measure(
    name: str,
    rows: int,
    classes: int,
    options: argparse.Namespace,
    excluded: dict[str, tuple[str, str]],
) -> Row:
    """One row of the table: what a child process found, or why none was started."""
    predicted = need(name, rows, options.width, classes, options.dtype.itemsize, options.limit)
    row = {"rows": rows, "classes": classes, "provider": name, "predicted_bytes": predicted}
    if name in excluded:
        return row | dict(zip(("status", "note"), excluded[name], strict=True))
    free = free_memory(options.device)
    if free is not None and predicted > USABLE * free:
        note = f"needs about {_gib(predicted)}, and {_gib(free)} are free"
        return row | {"status": "skipped", "note": note}
    request = memory_child.Request(
        name,
        rows,
        options.width,
        classes,
        str(options.device),
        options.dtype_name,
        options.limit,
        options.seconds,
    )
    answer = ask(request)
    row |= {key: answer[key] for key in ("status", "note")}
    if row["status"] != "ok":
        return row
    time = harness.spread(answer["microseconds"])
    rest = answer["extra_bytes"] - answer["gradient_bytes"]
    return row | {
        "extra_bytes": answer["extra_bytes"],
        "gradient_bytes": answer["gradient_bytes"],
        "rest_bytes": rest,
        "rest_by_limit": rest / options.limit,
        "median_us": time.median,
        "p20_us": time.p20,
        "p80_us": time.p80,
        "steps": len(answer["microseconds"]),
    }


def ask(request: memory_child.Request) -> dict[str, Any]:
    """Start a child with a request; a child that dies is an answer, too."""
    done = subprocess.run(memory_child.command(request), capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        note = f"its process was ended by signal {-done.returncode} (out of memory?)"
    else:
        note = (done.stderr.strip().splitlines() or ["its process failed without a word"])[-1]
    return {"status": "failed", "note": note}


def need(name: str, rows: int, width: int, classes: int, itemsize: int, limit: int) -> int:
    """About how many bytes a step and its inputs take."""
    inputs = 2 * rows * width + classes * (2 * width + 1)
    planes = PLANES[name] * rows * classes
    return itemsize * (2 * inputs + planes) + limit


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one cell, each with its time over that of every other."""
    times = {row["provider"]: row["median_us"] for row in rows if row["status"] == "ok"}
    return [
        row | {f"ratio_to_{other}": row["median_us"] / time for other, time in times.items()}
        if row["status"] == "ok"
        else row
        for row in rows
    ]


def columns() -> list[str]:
    """The columns of a row, in order."""
    return [
        *("rows", "classes", "provider", "status", "note", "predicted_bytes"),
        *("extra_bytes", "gradient_bytes", "rest_bytes", "rest_by_limit"),
        *("median_us", "p20_us", "p80_us", "steps"),
        *(f"ratio_to_{name}" for name in PLANES),
    ]


def print_results(console: Console, document: dict[str, Any]) -> None:
    """Print the conditions, the table (sizes in MiB) and the summary."""
    columns = [
        ("extra", lambda row: _mib(row["extra_bytes"])),
        ("gradients", lambda row: _mib(row["gradient_bytes"])),
        ("rest", lambda row: _mib(row["rest_bytes"])),
        ("/limit", report.ratio("rest_by_limit")),
        ("ms", lambda row: f"{row['median_us'] / 1000:,.1f}"),
        ("/joint", report.ratio("ratio_to_joint")),
        ("/linear_ce", report.ratio("ratio_to_linear_cross_entropy")),
    ]
    details = (
        f"width {document['width']}; workspace limit: {_mib(document['workspace_limit'])} MiB",
        document["statistic"],
    )
    table = report.make_table(document["rows"], "rows x classes", _row_cell, columns)
    report.print_results(console, document, details, [table])


def describe(rows: list[Row], limit: int, foreign_load: float | None) -> list[str]:
    """Say in words what the rows show, where dgl_ext is worse included."""
    sentences = []
    mine = [row for row in rows if row["provider"] == report.SUBJECT and row["status"] == "ok"]
    if mine:
        ordered = sorted(mine, key=lambda row: row["rest_bytes"])
        low, high = ordered[0], ordered[-1]
        within = sum(row["rest_bytes"] <= limit for row in mine)
        largest = max(mine, key=lambda row: row["rows"] * row["classes"])
        peaks = ", ".join(
            f"{row['provider']} {_mib(row['extra_bytes'])} MiB"
            for row in rows
            if _row_cell(row) == _row_cell(largest) and row["status"] == "ok"
        )
        sentences = [
            f"Beyond the gradients, {report.SUBJECT} takes {_mib(low['rest_bytes'])} MiB "
            f"({_row_cell(low)}) to {_mib(high['rest_bytes'])} MiB ({_row_cell(high)}); the limit "
            f"of {_mib(limit)} MiB holds in {within} of {len(mine)} cells.",
            f"At {_row_cell(largest)} a step takes at its peak {peaks}; the gradients are "
            f"{_mib(largest['gradient_bytes'])}.",
        ]
    sentences += report.compare(rows, _row_cell) + report.not_measured(rows, _row_cell)
    return sentences + report.noise(rows, foreign_load)


def _cell(rows: int, classes: int) -> str:
    return f"{rows}x{classes}"


def _row_cell(row: Row) -> str:
    return _cell(row["rows"], row["classes"])


def _mib(size: float) -> str:
    mib = size / MIB
    return f"{mib:,.1f}" if mib < 100 else f"{mib:,.0f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(PLANES)
    parser.add_argument("--rows", type=shared.counts, help=f"default {ROWS}")
    parser.add_argument("--classes", type=shared.counts, help=f"default {CLASSES}")
    parser.add_argument(
        "--limit", type=shared.positive("MiB"), help="the workspace's, in MiB, default as dgl_ext's"
    )
    parser.add_argument("--width", type=shared.whole, default=WIDTH, help=f"default {WIDTH}")
    parser.add_argument(
        "--providers", type=shared.some_of(PLANES), default=names, help=f"default {names}"
    )
    parser.add_argument(
        "--seconds", type=shared.positive("seconds"), help="timing per figure, default 2"
    )
    shared.add_common(parser)
    options = parser.parse_args(arguments)
    smoke = options.smoke
    options.rows = options.rows or shared.counts(SMOKE_ROWS if smoke else ROWS)
    options.classes = options.classes or shared.counts(SMOKE_CLASSES if smoke else CLASSES)
    default_limit = SMOKE_LIMIT if smoke else LIMITS[options.device.type]
    options.limit = max(1, int(MIB * (options.limit or default_limit)))
    options.seconds = options.seconds or (0.05 if smoke else 2.0)
    shared.complete(parser, options)
    return options


if __name__ == "__main__":
    sys.exit(main())

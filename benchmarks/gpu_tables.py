"""Measures all tables of docs/gpu.md in one command, on one GPU.

    python benchmarks/gpu_tables.py                # 51 cells of 8 seconds, and their checks
    python benchmarks/gpu_tables.py --quick        # of one second, in one pass: rougher figures
    python benchmarks/gpu_tables.py --only bfloat16,memory

Runs `bench_fusion.py` (mode step, eager and as CUDA graphs) for each dtype, and `bench_memory.py`;
each run leaves its JSON, CSV and plot in a folder of its own under `results-gpu`. Then `tables.md`
shows, for each run, the time of joint and every other provider's ratio to it, taken in the same
rounds. What is not there could not be run: its reason is in the CSV.

Liger takes part where logits are large; `pip install liger-kernel` brings it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAPER = "64x512x6,64x512x34,64x512x309,256x512x309"
PRODUCTS = "256x1024x1000,1024x2048x1000,4096x2048x1000"
OTHERS = "64x512x6,64x512x309"
DTYPES = ("float32", "tf32", "bfloat16")
PROVIDERS = "joint,two_pass,reference,dgl_ext_logits,fused,library,dgl_ext"
MEMORY = "memory"
# The smaller number of rows is there to be compared with float64, for which the larger is too much.
MEMORY_ARGUMENTS = (
    "--dtype bfloat16 --width 1024 --rows 1024,16384 --classes 32000 "
    "--providers joint,linear_cross_entropy,liger,dgl_ext_logits,fused,library,dgl_ext"
)
EXECUTIONS = {"eager": "called from Python", "graph": "CUDA graph"}

Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One benchmark and the folder of its results."""

    name: str
    script: str
    arguments: str

    def command(self, out: Path, *, quick: bool) -> list[str]:
        flags = ["--device", "cuda", "--out", str(out / self.name)]
        if quick:
            flags += ["--seconds", "1"]
            flags += ["--passes", "1"] if self.name != MEMORY else []
        return [sys.executable, str(HERE / self.script), *self.arguments.split(), *flags]


def runs(only: list[str]) -> Iterator[Run]:
    """All runs of the dtypes that are wanted, and that of memory."""
    for dtype in DTYPES:
        for fusion, small in (("concat", PAPER), ("sum,film", OTHERS)):
            parts = (("small", small, PROVIDERS), ("large", PRODUCTS, f"{PROVIDERS},liger"))
            for part, sizes, providers in parts:
                if dtype in only:
                    arguments = f"--fusion {fusion} --sizes {sizes} --dtype {dtype}"
                    arguments += f" --mode step --providers {providers}"
                    name = f"{fusion.replace(',', '-')}-{dtype}-{part}"
                    yield Run(name, "bench_fusion.py", arguments)
    if MEMORY in only:
        yield Run(MEMORY, "bench_memory.py", MEMORY_ARGUMENTS)


def tables(folder: Path) -> str:
    """The results in a folder as Markdown, each with the machine that they are from."""
    lines: list[str] = []
    for path in sorted(folder.glob("*/bench_*.json")):
        document: dict[str, Any] = json.loads(path.read_text())
        env = document["environment"]
        lines += [f"## {path.parent.name}, {document['dtype']}", ""]
        lines += [f"{env['gpu']}, torch {env['torch']}, CUDA {env['cuda']}, {env['date'][:10]}, "
                  f"commit {env['git_sha']}", ""]  # fmt: skip
        with path.with_suffix(".csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        by_memory = document["benchmark"] == MEMORY
        lines += [*(memory_table(rows) if by_memory else ratio_tables(rows)), ""]
    return "\n".join(lines)


def ratio_tables(rows: list[Row]) -> Iterator[str]:
    """For each execution the microseconds of joint, and the ratios of all others to it."""
    for execution in dict.fromkeys(row["execution"] for row in rows):
        here = [row for row in rows if row["execution"] == execution]
        others = [name for name in dict.fromkeys(row["provider"] for row in here)
                  if name != "joint"]  # fmt: skip
        yield f"{EXECUTIONS[execution]}: joint in us, the others by joint"
        yield ""
        yield f"| head, B x D x C | joint | {' | '.join(others)} |"
        yield "|---" * (2 + len(others)) + "|"
        for size in dict.fromkeys(_cell(row) for row in here):
            cell = {row["provider"]: row for row in here if _cell(row) == size}
            joint = _figure(cell["joint"], "median_us", ".0f")
            ratios = [_figure(cell[name], "ratio_to_joint", ".2f") for name in others]
            yield f"| {size} | {joint} | {' | '.join(ratios)} |"
        yield ""


def memory_table(rows: list[Row]) -> Iterator[str]:
    """Peak beyond the inputs and time of each provider, at each size."""
    yield "| rows x classes | provider | extra, MiB | ms | / joint |"
    yield "|---|---|---|---|---|"
    for row in rows:
        extra = _figure(row, "extra_bytes", ",.0f", 1 / 2**20)
        time = _figure(row, "median_us", ",.1f", 1e-3)
        ratio = _figure(row, "ratio_to_joint", ".2f")
        yield (
            f"| {row['rows']} x {row['classes']} | {row['provider']} | {extra} | {time} | {ratio} |"
        )


def _cell(row: Row) -> str:
    return f"{row['fusion']} " + " x ".join(row[name] for name in ("batch", "width", "classes"))


def _figure(row: Row, column: str, form: str, factor: float = 1.0) -> str:
    """A figure, or why there is none."""
    text = row.get(column)
    return format(float(text) * factor, form) if text else row["status"]


def main(arguments: list[str] | None = None) -> int:
    """Run all and write the tables of what ran; returns 1 if a benchmark failed."""
    names = [*DTYPES, MEMORY]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results-gpu", help="folder")
    parser.add_argument("--quick", action="store_true", help="little time, rougher figures")
    parser.add_argument("--only", default=",".join(names), help=f"some of {','.join(names)}")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if not set(only) <= set(names):
        parser.error(f"argument --only: expected some of {', '.join(names)}; got {options.only!r}")
    failed = []
    for run in runs(only):
        print(f"--- {run.name}", flush=True)
        if subprocess.call(run.command(options.out, quick=options.quick)):
            failed.append(run.name)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "tables.md").write_text(tables(options.out))
    print(f"wrote {options.out / 'tables.md'}" + (f"; failed: {', '.join(failed)}" * bool(failed)))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

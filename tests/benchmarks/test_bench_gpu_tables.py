"""The command that measures the GPU tables: what it runs, and the tables that it makes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import test_bench_fusion  # noqa: F401 (puts benchmarks/ on the path)
import torch

import bench_fusion  # isort: skip
import bench_memory  # isort: skip
import gpu_tables  # isort: skip


@pytest.fixture
def _one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.parametrize("quick", [False, True])
def test_it_runs_the_goals_sizes_with_arguments_that_the_benchmarks_take(tmp_path, quick):
    sizes, precisions = {}, {}
    for run in gpu_tables.runs([*gpu_tables.DTYPES, gpu_tables.MEMORY]):
        arguments = run.command(tmp_path, quick=quick)[2:]
        if run.script == "bench_memory.py":
            memory = bench_memory._parse(arguments)
            continue
        options = bench_fusion._parse(arguments)
        assert (options.modes, options.graphs) == (["step"], "both")
        assert (options.seconds, options.passes) == ((1, 1) if quick else (8, 3))
        assert ("liger" in options.providers) == run.name.endswith("large")
        for fusion in options.fusion:
            sizes.setdefault((fusion, options.dtype_name), []).extend(options.sizes)
        precisions[options.dtype_name] = (options.dtype, torch.get_float32_matmul_precision())
    assert (memory.rows, memory.width, memory.classes) == ([1024, 16384], 1024, [32000])
    assert (memory.dtype, memory.limit) == (torch.bfloat16, 512 * 2**20)
    large = [(256, 1024, 1000), (1024, 2048, 1000), (4096, 2048, 1000)]
    for (fusion, _), found in sizes.items():
        classes = (6, 34, 309) if fusion == "concat" else (6, 309)
        paper = [(64, 512, c) for c in classes] + [(256, 512, 309)] * (fusion == "concat")
        assert found == paper + large
    assert len(sizes) == 9
    assert precisions == {
        "float32": (torch.float32, "highest"),
        "tf32": (torch.float32, "high"),
        "bfloat16": (torch.bfloat16, "highest"),
    }


@pytest.mark.slow
@pytest.mark.gate
def test_it_makes_tables_of_what_the_benchmarks_write(tmp_path, monkeypatch, capsys):
    """Tiny runs on the CPU in the place of the GPU's."""
    common = "--device cpu --seconds 0.001"
    fusion = f"{common} --fusion concat --sizes 5x8x3 --passes 1 --mode step --providers"
    found = [
        gpu_tables.Run("tiny", "bench_fusion.py", f"{fusion} joint,two_pass,liger"),
        gpu_tables.Run("memory", "bench_memory.py", f"{common} --rows 8 --classes 16 --smoke"),
        gpu_tables.Run("broken", "bench_fusion.py", f"{fusion} nothing"),
    ]
    monkeypatch.setattr(gpu_tables, "runs", lambda only: found)
    monkeypatch.setattr(
        gpu_tables.Run,
        "command",
        lambda run, out, quick: [
            *(sys.executable, str(gpu_tables.HERE / run.script), *run.arguments.split()),
            *("--out", str(Path(out) / run.name)),
        ],
    )
    assert gpu_tables.main(["--out", str(tmp_path)]) == 1
    assert "failed: broken" in capsys.readouterr().out
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert "## tiny, float32" in lines
    assert "| head, B x D x C | joint | two_pass | liger |" in lines
    row = next(line for line in lines if line.startswith("| concat 5 x 8 x 3 | "))
    assert row.endswith(" | left out |")
    assert any(line.startswith("| 8 x 16 | dgl_ext | ") for line in lines)


def test_a_part_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_tables.main(["--only", "int8"])
    assert "expected some of float32, tf32, bfloat16, memory; got 'int8'" in capsys.readouterr().err

"""The memory benchmark: what it measures, refuses and writes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgl_ext

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_memory  # noqa: E402
import memory_child  # noqa: E402
import peak_memory  # noqa: E402
import providers  # noqa: E402

CPU = torch.device("cpu")
MIB = 2**20
SMALL = ["--device", "cpu", "--rows", "8", "--classes", "16", "--seconds", "0.001"]

needs_clear_refs = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is reset in /proc"
)


def request(provider="joint", rows=8, classes=16, **more):
    fields = {"device": "cpu", "dtype": "float32", "workspace_limit": MIB, "seconds": 1e-3}
    return memory_child.Request(provider, rows, 512, classes, **(fields | more))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One `--smoke` run as a user starts it, from another folder: text and path less endings."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(BENCHMARKS / "bench_memory.py"), "--smoke", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", "results"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "results" / "bench_memory_cpu_float32_smoke"


@needs_clear_refs
@pytest.mark.slow
@pytest.mark.gate
def test_smoke_csv(smoke):
    with smoke[1].with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == list(bench_memory.PLANES)
    plane = 256 * 1000 * 4
    for row in rows:
        if row["provider"] in ("liger", "fused", "library"):
            assert (row["status"], row["note"]) == ("left out", "it runs on CUDA only")
            continue
        if row["provider"] == "linear_cross_entropy" and row["status"] == "left out":
            continue
        assert (row["status"], row["note"]) == ("ok", "")
        assert int(row["gradient_bytes"]) == 4 * (2 * 256 * 512 + 1000 * 1024 + 1000)
        rest = int(row["extra_bytes"]) - int(row["gradient_bytes"])
        assert int(row["rest_bytes"]) == rest
        assert float(row["rest_by_limit"]) == rest / MIB
        assert rest > 0.9 * bench_memory.PLANES[row["provider"]] * plane
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["steps"]) >= 1
        assert float(row[f"ratio_to_{row['provider']}"]) == 1


@needs_clear_refs
def test_the_peak_sees_a_known_allocation():
    kept = []

    def keep():
        kept.append(torch.ones(64 * MIB, dtype=torch.int8))

    def drop():
        torch.ones(96 * MIB, dtype=torch.int8)

    assert peak_memory.peak_extra(keep, CPU) == pytest.approx(64 * MIB, abs=2 * MIB)
    assert peak_memory.peak_extra(drop, CPU) == pytest.approx(96 * MIB, abs=2 * MIB)
    assert peak_memory.peak_extra(lambda: None, CPU) < 2 * MIB  # the peak before is forgotten


@needs_clear_refs
def test_gradients_by_hand(monkeypatch):
    monkeypatch.setattr(memory_child, "WARM_UP", (2, 3))
    before = dgl_ext.settings.workspace_limit()
    try:
        answer = memory_child.measure(request(rows=7, classes=5, workspace_limit=12345))
        assert dgl_ext.settings.workspace_limit() == 12345
    finally:
        dgl_ext.set_workspace_limit(before)
    # Two features of 7 x 512, a weight of 5 x 1024, a bias of 5.
    assert answer["gradient_bytes"] == 4 * (2 * 7 * 512 + 5 * 1024 + 5)
    assert all(value > 0 for value in answer["microseconds"])


def child_says(monkeypatch, code):
    monkeypatch.setattr(memory_child, "command", lambda _: [sys.executable, "-c", code])
    return bench_memory.ask(request())


def test_a_child_that_dies_is_reported(monkeypatch):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    note = "its process was ended by signal 9 (out of memory?)"
    assert child_says(monkeypatch, kill) == {"status": "failed", "note": note}
    answer = child_says(monkeypatch, "raise ValueError('no such thing')")
    assert answer == {"status": "failed", "note": "ValueError: no such thing"}
    assert child_says(monkeypatch, "raise SystemExit(3)")["note"].endswith("without a word")
    assert child_says(monkeypatch, "print('noise'); print('{\"status\": 1}')") == {"status": 1}


def test_a_wrong_provider_is_not_measured(monkeypatch, tmp_path, capsys):
    right = providers.PROVIDERS["step"]["joint"].build

    def wrong(problem):
        step = right(problem)

        def broken():
            return tuple(loss * 1.01 for loss in step())

        return broken

    asked, limits = [], []

    def answer(request):
        asked.append(request)
        figures = {"extra_bytes": 5000, "gradient_bytes": 3000, "microseconds": [3.0, 1.0, 2.0]}
        return {"status": "ok", "note": ""} | figures

    def compared(problem):
        limits.append(dgl_ext.settings.workspace_limit())
        return right(problem)

    listed = providers.PROVIDERS["step"]
    monkeypatch.setitem(listed, "joint", providers.Provider(wrong, decoupled=False))
    monkeypatch.setitem(listed, "library", providers.Provider(compared, decoupled=False))
    monkeypatch.setattr(bench_memory, "ask", answer)
    flags = [*SMALL, "--out", str(tmp_path), "--classes", "16,32", "--limit", "0.001"]
    assert bench_memory.main([*flags, "--providers", "joint,library"]) == 1
    assert "joint is wrong at every cell: losses[0] differs" in capsys.readouterr().out
    assert [(one.provider, one.classes) for one in asked] == [("library", 16), ("library", 32)]
    assert asked[0].workspace_limit == 1048  # bytes
    assert limits == [3 * 8 * 16 * 4 // 4]  # a quarter of what the smallest size needs
    assert dgl_ext.settings.workspace_limit() is None
    document = json.loads((tmp_path / "bench_memory_cpu_float32.json").read_text())
    row = document["rows"][1]
    assert (row["rest_bytes"], row["rest_by_limit"]) == (2000, 2000 / 1048)
    assert (row["median_us"], row["steps"], row["ratio_to_library"]) == (2, 3, 1)
    assert set(row) <= set(bench_memory.columns())


def figures(provider, rows, classes, extra, microseconds):
    return {
        "provider": provider,
        "rows": rows,
        "classes": classes,
        "status": "ok",
        "note": "",
        "extra_bytes": extra * MIB,
        "gradient_bytes": 10 * MIB,
        "median_us": microseconds,
        "rest_bytes": (extra - 10) * MIB,
        "rest_by_limit": (extra - 10) / 64,
    }

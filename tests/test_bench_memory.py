"""The memory benchmark: what it measures, refuses and writes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import dgl_ext

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_memory  # noqa: E402
import harness  # noqa: E402
import memory_child  # noqa: E402
import memory_report  # noqa: E402
import peak_memory  # noqa: E402
import providers  # noqa: E402
import report  # noqa: E402

CPU = torch.device("cpu")
MIB = 2**20
SMALL = ["--device", "cpu", "--rows", "8", "--classes", "16", "--seconds", "0.001"]

needs_clear_refs = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is reset in /proc"
)


def request(provider="joint", rows=8, classes=16, **more):
    fields = {"device": "cpu", "dtype": "float32", "workspace_limit": MIB, "seconds": 1e-3}
    return memory_child.Request(provider, rows, 512, classes, **(fields | more))


def parse(tmp_path, *flags):
    return bench_memory._parse([*SMALL, "--out", str(tmp_path), *flags])


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


def test_smoke_json_and_plot(smoke):
    document = json.loads(smoke[1].with_suffix(".json").read_text())
    for key in ("date", "cpu", "threads", "gpu", "torch", "cuda", "git_sha", "dgl_ext"):
        assert key in document["environment"]
    assert (document["width"], document["workspace_limit"]) == (512, MIB)
    image = smoke[1].with_suffix(".png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_smoke_output_is_plain_text_and_says_what_it_shows(smoke):
    text = smoke[0]
    assert "\x1b" not in text
    names = map(report.short_name, bench_memory.PLANES)
    for name in ("256x1000", "extra", "gradients", "rest", "/limit", *names):
        assert name in text
    for sentence in json.loads(smoke[1].with_suffix(".json").read_text())["summary"]:
        assert " ".join(sentence.split()) in " ".join(text.split())


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
def test_memory_freed_before_is_not_taken_unseen():
    # Small blocks stay with the allocator when they are freed, between others that are not.
    blocks = [torch.ones(64 * 1024, dtype=torch.int8) for _ in range(512)]
    others = blocks[::8]
    del blocks

    def again():
        others.extend(torch.ones(64 * 1024, dtype=torch.int8) for _ in range(448))

    assert peak_memory.peak_extra(again, CPU) > 24 * MIB


def test_a_system_that_does_not_tell_is_no_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path / "none")
    with pytest.raises(providers.Unavailable, match="needs Linux's /proc/self/clear_refs"):
        peak_memory.peak_extra(lambda: None, CPU)
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path)
    (tmp_path / "status").write_text("VmSize: 1 kB\n")
    with pytest.raises(providers.Unavailable, match="/proc/self/status has no VmRSS"):
        peak_memory.peak_extra(lambda: None, CPU)


def test_on_cuda_the_peak_is_that_of_torchs_allocator(monkeypatch):
    log, device = [], torch.device("cuda", 0)
    for name, answer in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 1000),
        ("max_memory_allocated", 1700),
    ):

        def call(where, name=name, answer=answer):
            assert where == device
            log.append(name)
            return answer

        monkeypatch.setattr(torch.cuda, name, call)
    assert peak_memory.peak_extra(lambda: log.append("step"), device) == 700
    assert log == [
        *("synchronize", "reset_peak_memory_stats", "memory_allocated", "step"),
        *("synchronize", "max_memory_allocated"),
    ]


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


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (providers.Unavailable("needs more"), "left out", "needs more"),
        (RuntimeError("DefaultCPUAllocator: can't"), "failed", "RuntimeError: DefaultCPUAllocator"),
    ],
)
def test_what_a_child_answers_to_an_error(monkeypatch, capsys, error, status, note):
    def fail(_):
        raise error

    monkeypatch.setattr(memory_child, "measure", fail)
    monkeypatch.setattr(sys, "argv", memory_child.command(request())[1:])
    memory_child.main()
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == status
    assert answer["note"].startswith(note)


def test_what_would_not_fit_is_skipped_with_its_need(monkeypatch, tmp_path):
    options = parse(tmp_path)
    monkeypatch.setattr(bench_memory, "free_memory", lambda _: 8 * 2**30)
    monkeypatch.setattr(bench_memory, "ask", lambda _: {"status": "asked", "note": ""})
    rows = [
        bench_memory.measure(name, 16384, 32000, options, {})
        for name in ("joint", "dgl_ext_logits", "dgl_ext")
    ]
    assert [row["status"] for row in rows] == ["asked", "skipped", "asked"]
    # 6 arrays of rows x classes, inputs and gradients, and the limit of 64 MiB.
    need = 4 * (6 * 16384 * 32000 + 2 * (2 * 16384 * 512 + 32000 * 1025)) + 64 * MIB
    assert rows[1]["predicted_bytes"] == need
    assert rows[1]["note"] == f"needs about {need / 2**30:.1f} GiB, and 8.0 GiB are free"


def test_what_the_comparison_took_is_given_back_to_the_gpu(monkeypatch, tmp_path):
    options, calls = parse(tmp_path), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    steps = lambda cell, *_: calls.append(cell.device.type)  # noqa: E731
    monkeypatch.setattr(bench_memory.fusion_cells, "right_steps", steps)
    for options.device in (CPU, torch.device("cuda")):
        bench_memory.check(8, 16, options)
    assert calls == ["cpu", "cuda", "empty"]


def test_free_memory_is_what_the_system_says(monkeypatch):
    if Path("/proc/meminfo").exists():
        assert 2**26 < bench_memory.free_memory(CPU) < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert bench_memory.free_memory(torch.device("cuda", 0)) == 123

    def no_file(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_file)
    assert bench_memory.free_memory(CPU) is None


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
    assert "joint is wrong at every size: losses[0] differs" in capsys.readouterr().out
    assert [(one.provider, one.classes) for one in asked] == [("library", 16), ("library", 32)]
    assert asked[0].workspace_limit == 1048  # bytes
    assert limits == [3 * 8 * 16 * 4 // 4]  # a quarter of what the smallest size needs
    assert dgl_ext.settings.workspace_limit() is None
    document = json.loads((tmp_path / "bench_memory_cpu_float32.json").read_text())
    row = document["rows"][1]
    assert (row["rest_bytes"], row["rest_by_limit"]) == (2000, 2000 / 1048)
    assert (row["median_us"], row["steps"], row["ratio_to_library"]) == (2, 3, 1)
    assert set(row) <= set(bench_memory.columns())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "expected whole numbers above 0 as in 1024,4096; got '0'"),
        (["--rows", "64,x"], "got '64,x'"),
        (["--classes", ""], "got ''"),
        (["--limit", "0"], "expected a number of MiB above 0; got '0'"),
        (["--seconds", "inf"], "expected a number of seconds above 0; got 'inf'"),
        (["--providers", "joint,compiled"], "expected some of joint, .*; got 'compiled'"),
        (["--device", "tpu"], "expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", __file__], "argument --out: cannot make the folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        bench_memory.main(flags)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_defaults(tmp_path):
    options = bench_memory._parse(["--device", "cpu", "--out", str(tmp_path)])
    assert (max(options.rows), max(options.classes)) == (16384, 32000)
    assert options.limit == 64 * 2**20
    assert set(options.providers) <= set(providers.PROVIDERS["step"])
    assert bench_memory._parse(["--rows", "9,3,9", "--out", str(tmp_path)]).rows == [3, 9]


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


@pytest.fixture
def table():
    rows = []
    for (count, classes), (mine, theirs) in {
        (1024, 1000): ((20, 110), (40, 100)),
        (16384, 32000): ((80, 300), (6000, 400)),
    }.items():
        here = [
            figures("joint", count, classes, *theirs),
            figures("dgl_ext", count, classes, *mine),
            {"provider": "dgl_ext_logits", "rows": count, "classes": classes}
            | {"status": "skipped", "note": f"needs {count}"},
            {"provider": "library", "rows": count, "classes": classes}
            | {"status": "left out", "note": "no extension"},
        ]
        rows += bench_memory.with_ratios(here)
    return rows


def test_summary(table):
    assert memory_report.describe(table, 64 * MIB, 0.25) == [
        "Beyond the gradients, dgl_ext takes 10.0 MiB (1024x1000) to 70.0 MiB (16384x32000); the "
        "limit of 64.0 MiB holds in 1 of 2 cells.",
        "At 16384x32000 a step takes at its peak joint 6,000 MiB, dgl_ext 80.0 MiB; the gradients "
        "are 10.0.",
        "Against joint, dgl_ext takes 0.75 (16384x32000) to 1.10 (1024x1000) times as long; slower "
        "in 1 of 2 cells.",
        "dgl_ext_logits was skipped at 1024x1000: needs 1024",
        "library was left out at every size: no extension",
        "dgl_ext_logits was skipped at 16384x32000: needs 16384",
        "Busy: other processes took 25% of the CPUs while this was timed.",
    ]
    without = [row for row in table if row["provider"] != "dgl_ext"]
    assert memory_report.describe(without, 64 * MIB, None)[0] == "dgl_ext was not measured."


def test_table_fits_80_columns_and_plot_takes_many_rows(table, tmp_path):
    rows = [figures("linear_cross_entropy", 16384, 32000, 12345, 98765432.1), *table]
    rows[0] |= {"ratio_to_joint": 10.04, "ratio_to_linear_cross_entropy": 1.0}
    rows += [figures("dgl_ext", 2**i, 1000, 20, 5) for i in range(12)]  # more than markers
    document = {"rows": rows, "summary": [], "dtype": "float32", "statistic": "", "step": ""}
    document |= {"environment": harness.environment(CPU), "width": 512, "workspace_limit": 64 * MIB}
    text = io.StringIO()
    memory_report.print_results(Console(file=text, width=80), document)
    line = next(line for line in text.getvalue().splitlines() if "98,765" in line)
    expected = ["linear_ce", "12,345", "10.0", "12,335", "192.73", "98,765.4"]
    assert line.split() == [*expected, "10.04", "1.00"]
    assert "skipped" in text.getvalue()
    memory_report.plot(tmp_path / "plot.png", document)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

"""The fusion benchmark: what it refuses, what it writes, and how it computes its statistics."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import dgl_ext

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_fusion  # noqa: E402
import fusion_cells  # noqa: E402
import fusion_report  # noqa: E402
import harness  # noqa: E402
import providers  # noqa: E402

CPU = torch.device("cpu")
CEILING = harness.Ceiling(flops_per_second=1e11, bytes_per_second=1e10)
SIZE = (5, 8, 3)


def cell(fusion="concat", dtype=torch.float32):
    return fusion_cells.Cell(fusion, SIZE, CPU, dtype)


def measured_rows(names):
    timing = fusion_cells.Timing(names)
    fusion_cells.measure(cell(), timing, 0.01)
    return fusion_cells.rows(cell(), timing, CEILING)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One `--smoke` run as a user starts it, from another folder."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(BENCHMARKS / "bench_fusion.py"), "--smoke", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", "results"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads wait for each other on a busy machine
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "results"


def test_smoke_csv(smoke):
    with (smoke[1] / "bench_fusion_cpu_float32_smoke.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fusion"], row["provider"]) for row in rows] == [
        (fusion, name) for fusion in providers.FUSIONS for name in providers.PROVIDERS
    ]
    must_run = {"joint", "two_pass", "reference"}
    if dgl_ext._extension.available():
        must_run.add("dgl_ext")
    for row in rows:
        assert row["status"] == "ok" if row["provider"] in must_run else row["status"]
        if row["status"] != "ok":
            assert row["status"] == "left out"
            assert row["note"]
            continue
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["rounds"]) >= harness.MIN_ROUNDS
        assert (row["mode"], row["launches"]) == ("eager", "")
        assert float(row[f"ratio_to_{row['provider']}"]) == 1
        for column in ("ratio_to_joint", "ratio_to_two_pass", "gflops_per_s", "gbytes_per_s"):
            assert 0 < float(row[column]) < math.inf
        assert float(row["share_of_ceiling"]) > 0
        assert row["bound"] in ("compute", "memory")


def test_smoke_json(smoke):
    document = json.loads((smoke[1] / "bench_fusion_cpu_float32_smoke.json").read_text())
    for key in ("date", "cpu", "threads", "gpu", "torch", "cuda", "git_sha", "dgl_ext"):
        assert key in document["environment"]
    assert document["environment"]["torch"] == torch.__version__
    assert document["ceiling"]["flops_per_second"] > 0
    assert document["statistic"] == harness.STATISTIC
    assert len(document["rows"]) == len(providers.FUSIONS) * len(providers.PROVIDERS)


def test_smoke_plot(smoke):
    image = (smoke[1] / "bench_fusion_cpu_float32_smoke.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_smoke_output_is_plain_text_and_says_what_it_shows(smoke):
    text = smoke[0]
    assert "\x1b" not in text
    for name in (*providers.FUSIONS, *providers.PROVIDERS, "/joint", "/two_pass"):
        assert name in text
    document = json.loads((smoke[1] / "bench_fusion_cpu_float32_smoke.json").read_text())
    assert document["summary"]
    for sentence in document["summary"]:
        assert " ".join(sentence.split()) in " ".join(text.split())


def broken(kind):
    """A provider that is the reference but for one mistake."""

    def build(problem):
        right = providers.PROVIDERS["reference"].build(problem)

        def step():
            logits = right()
            if kind in ("scaled gradients", "zeroed gradients"):
                for leaf in problem.leaves().values():
                    leaf.grad.mul_(1.001 if kind == "scaled gradients" else 0)
            elif kind == "no gradient":
                problem.features[1].grad = None
            elif kind == "unimodal logits swapped":
                return (logits[0], logits[2], logits[1])
            elif kind == "too few logits":
                return logits[:2]
            elif kind == "wrong shape":
                return (logits[0][:1], *logits[1:])
            elif kind == "nan":
                return (logits[0] * math.nan, *logits[1:])
            return logits

        return step

    return providers.Provider(build)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("scaled gradients", r"features\[0\].grad differs from the reference by 1.0e-03"),
        ("zeroed gradients", r"features\[0\].grad differs"),
        ("no gradient", r"features\[1\].grad is missing"),
        ("unimodal logits swapped", r"logits\[1\] differs"),
        ("too few logits", r"logits\[2\] is missing"),
        ("wrong shape", r"logits\[0\] has shape \(1, 3\), the reference \(5, 3\)"),
        ("nan", r"logits\[0\] differs from the reference by nan"),
    ],
)
def test_a_wrong_provider_is_not_timed(monkeypatch, kind, named):
    timed = []

    def time_nothing(steps, *_, **__):
        timed.extend(steps)
        return {name: [1.0] for name in steps}

    monkeypatch.setattr(harness, "time_alternating", time_nothing)
    monkeypatch.setitem(providers.PROVIDERS, "broken", broken(kind))
    rows = measured_rows(["broken", "reference"])
    assert timed == [("reference", "eager")]
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "median_us" not in rows[0]
    assert re.search(named, rows[0]["note"])


def test_a_wrong_or_failing_provider_ends_the_run_with_an_error(monkeypatch, tmp_path, capsys):
    def fails(problem):
        raise ValueError("no such kernel")

    monkeypatch.setitem(providers.PROVIDERS, "broken", broken("zeroed gradients"))
    monkeypatch.setitem(providers.PROVIDERS, "fails", providers.Provider(fails))
    flags = ["--smoke", "--device", "cpu", "--fusion", "sum", "--sizes", "5x8x3"]
    flags += ["--out", str(tmp_path)]
    assert bench_fusion.main([*flags, "--providers", "joint,broken"]) == 1
    assert "broken is wrong at every cell: features[0].grad differs" in capsys.readouterr().out
    assert bench_fusion.main([*flags, "--providers", "fails"]) == 1
    assert "fails failed at every cell: ValueError: no such kernel" in capsys.readouterr().out
    assert bench_fusion.main([*flags, "--providers", "joint,reference"]) == 0


def test_what_cannot_run_is_left_out_with_a_reason(monkeypatch):
    def lacks(problem):
        raise providers.Unavailable("needs a newer torch")

    monkeypatch.setitem(providers.PROVIDERS, "lacks", providers.Provider(lacks))
    rows = measured_rows(["lacks", "joint"])
    assert (rows[0]["status"], rows[0]["note"]) == ("left out", "needs a newer torch")
    assert rows[1]["median_us"] > 0
    assert "lacks was left out at every cell: needs a newer torch" in fusion_report.describe(rows)


def test_nothing_is_timed_where_no_provider_can_run(monkeypatch):
    monkeypatch.setattr(harness, "time_alternating", None)
    monkeypatch.setitem(providers.PROVIDERS, "broken", broken("nan"))
    assert [row["status"] for row in measured_rows(["broken"])] == ["wrong"]


def test_dgl_ext_is_left_out_rather_than_timed_as_the_reference(monkeypatch):
    monkeypatch.setattr(dgl_ext._extension, "available", lambda *_: False)
    with pytest.raises(providers.Unavailable, match=r"chose the reference for cpu torch.float32"):
        providers.PROVIDERS["dgl_ext"].build(cell().problem())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", providers.FUSIONS)
def test_two_pass_agrees_with_the_reference_and_joint_does_not(fusion, dtype):
    here = cell(fusion, dtype)
    results = {
        name: fusion_cells.snapshot(here.problem(), providers.PROVIDERS[name])[1]
        for name in ("reference", "two_pass", "joint")
    }
    truth = results["reference"]
    assert not fusion_cells.difference(results["two_pass"], truth, dtype, everything=True)
    assert not fusion_cells.difference(results["joint"], truth, dtype, everything=False)
    no_logits = {name: value for name, value in truth.items() if "grad" in name}
    assert "features[0].grad differs" in fusion_cells.difference(
        results["joint"], no_logits, dtype, everything=True
    )


@pytest.mark.parametrize(
    ("fusion", "two_pass_units"), [("concat", 16), ("sum", 10)], ids=["concat", "sum"]
)
def test_work_of_the_published_recipe(fusion, two_pass_units):
    """In multiply-adds of rows x width x classes: joint 6, the published recipe 16 or 10."""
    units = {}
    for name in ("joint", "two_pass"):
        step = providers.PROVIDERS[name].build(cell(fusion).problem())
        with FlopCounterMode(display=False) as counter:
            step()
        units[name] = counter.get_total_flops() / (2 * math.prod(SIZE))
    assert units == {"joint": 6, "two_pass": two_pass_units}


@pytest.mark.parametrize("fusion", providers.FUSIONS)
def test_least_work_is_what_a_joint_step_does(fusion):
    step = providers.PROVIDERS["joint"].build(cell(fusion).problem())
    with FlopCounterMode(display=False) as counter:
        step()
    flops, _ = providers.least_work(fusion, *SIZE, 4, decoupled=False)
    assert counter.get_total_flops() == flops


@pytest.mark.parametrize("fusion", providers.FUSIONS)
def test_least_traffic_counts_every_tensor_once(fusion):
    problem = cell(fusion).problem()
    logits = providers.PROVIDERS["reference"].build(problem)()
    nbytes = sum(2 * leaf.nbytes for leaf in problem.leaves().values())  # value and gradient
    nbytes += problem.target.nbytes + sum(z.nbytes for z in logits)
    assert providers.least_work(fusion, *SIZE, 4, decoupled=True)[1] == nbytes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fusion", "concat,gated"], "expected some of concat, sum, film; got 'gated'"),
        (["--providers", "joint,liger"], "got 'liger'"),
        (["--sizes", "64x512"], "expected batch x width x classes as in .*; got '64x512'"),
        (["--sizes", "64x512x0"], "got '64x512x0'"),
        (["--sizes", "64x512x6,ax2x3"], "got 'ax2x3'"),
        (["--sizes", ""], "got ''"),
        (["--seconds", "0"], "expected a number of seconds above 0; got '0'"),
        (["--seconds", "nan"], "got 'nan'"),
        (["--seconds", "fast"], "got 'fast'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "meta"], "got 'meta'"),
        (["--device", "cuda:99"], "torch sees [0-9]+ CUDA devices here; got 'cuda:99'"),
        (["--out", __file__], "argument --out: cannot make the folder"),
        (
            ["--device", "cpu", "--graphs", "graphs"],
            "--graphs: expected eager on cpu, since CUDA gr",
        ),
        (["--device", "cpu", "--graphs", "both"], "need --device cuda; got 'both'"),
        (["--graphs", "some"], "invalid choice: 'some'"),
        (["--mode", "step"], "unrecognized arguments"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        bench_fusion.main(flags)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit):
        bench_fusion.main(["--smoke", "--out", str(tmp_path)])
    assert f"argument --out: cannot write to {tmp_path}" in capsys.readouterr().err


def test_spread():
    assert harness.spread([3.0]) == harness.Spread(3, 3, 3)
    assert harness.spread([50, 10, 30, 20, 40, 0]) == harness.Spread(25, 10, 40)
    assert harness.spread([0, 1]) == harness.Spread(0.5, 0.2, 0.8)
    with pytest.raises(ValueError, match="values: expected at least one measurement"):
        harness.spread([])


def test_paired_ratio_is_taken_within_rounds():
    # The ratio of the medians would be 1.5.
    assert harness.paired_ratio([3, 10, 2], [1, 10, 2]).median == 1
    with pytest.raises(
        ValueError, match=r"baseline: expected as many rounds as times \(2\), got 1"
    ):
        harness.paired_ratio([1, 2], [1])


def test_block_value_skips_the_first_step_of_a_longer_block():
    assert harness._block_value([9, 1, 2, 3]) == 2
    assert harness._block_value([9, 1, 2]) == 2
    assert harness._block_value([9]) == 9


def test_time_alternating_takes_turns():
    calls, shares = [], []

    def step(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    steps = {"fast": step("fast", 0.002), "slow": step("slow", 0.008)}
    times = harness.time_alternating(steps, CPU, 1e-9, min_rounds=6, on_round=shares.append)
    assert {name: len(values) for name, values in times.items()} == {"fast": 6, "slow": 6}
    assert all(value > 8000 for value in times["slow"])
    assert all(value > 2000 for value in times["fast"])
    assert harness.paired_ratio(times["fast"], times["slow"]).median < 0.7
    assert len(shares) == 6
    assert shares[-1] == 1
    # After the warm-up no three blocks of one candidate follow each other.
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns.count("slow") >= 4


def test_time_alternating_goes_on_for_the_time_asked():
    times = harness.time_alternating({"short": lambda: None}, CPU, 0.1, min_rounds=1)
    assert len(times["short"]) > 1


def test_time_alternating_restores_the_garbage_collector():
    seen = []

    def fails():
        seen.append(gc.isenabled())
        raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        harness.time_alternating({"fails": fails}, CPU, 0.01)
    assert seen == [False]
    assert gc.isenabled()


def test_ceiling_floor_is_the_harder_of_the_two_limits():
    assert CEILING.floor_seconds(flops=1e11, nbytes=1e9) == 1
    assert CEILING.floor_seconds(flops=1e9, nbytes=2e10) == 2


def test_measured_ceiling_is_a_rate():
    ceiling = harness.measure_ceiling(CPU, torch.float32, quick=True)
    assert 1e8 < ceiling.flops_per_second < 1e15
    assert 1e8 < ceiling.bytes_per_second < 1e13


def test_git_sha_without_git(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert harness.environment(CPU)["git_sha"] == "unknown"


def summary_row(fusion, provider, ratio, p20, p80):
    row = {"fusion": fusion, "batch": 64, "width": 512, "classes": 6, "provider": provider}
    row |= {"status": "ok", "note": "", "p20_us": 90, "p80_us": 110}
    return row | {"ratio_to_joint": ratio, "ratio_to_joint_p20": p20, "ratio_to_joint_p80": p80}


def test_summary_names_slow_cells_with_figures():
    rows = [summary_row("sum", "joint", 1, 1, 1)]
    rows += [
        summary_row("concat", "dgl_ext", 1.325, 1.3, 1.4),
        summary_row("sum", "dgl_ext", 0.9, 0.8, 0.95),
        summary_row("film", "dgl_ext", 1.01, 0.97, 1.1),
        summary_row("gated", "dgl_ext", 0.99, 0.97, 1.1),
    ]
    (sentence,) = fusion_report.describe(rows)
    assert "takes 0.90 (sum 64x512x6) to 1.32 (concat 64x512x6) times as long" in sentence
    assert "faster in 1 of 4 cells, slower in 1, undecided in 2" in sentence
    assert "dgl_ext is slower than joint at concat 64x512x6 by 32%." in sentence


def test_summary_without_the_subject():
    rows = [summary_row("sum", "joint", 1, 1, 1)]
    assert fusion_report.describe(rows) == ["dgl_ext was not timed."]


def test_table_of_slow_steps_fits_80_columns():
    slow = {"median_us": 1289801.4, "p20_us": 1195778.2, "p80_us": 1326012.9, "bound": "compute"}
    slow |= {"gflops_per_s": 123456.7, "share_of_ceiling": 0.987, "ratio_to_two_pass": 10.04}
    rows = [summary_row("film", name, 10.04, 9, 11) | slow for name in providers.PROVIDERS]
    rows = [row | {"batch": 1024, "width": 2048, "classes": 1000} for row in rows]
    rows.append(rows[0] | {"provider": "broken", "status": "left out"})
    document = {"rows": rows, "summary": [], "dtype": "float32", "statistic": ""}
    document |= {"environment": harness.environment(CPU), "ceiling": dataclasses.asdict(CEILING)}
    text = io.StringIO()
    fusion_report.print_results(Console(file=text, width=80), document)
    line = next(line for line in text.getvalue().splitlines() if "dgl_ext  " in line)
    figures = ["dgl_ext", "1289801", "1195778-1326013", "10.04", "10.04"]
    assert line.split() == [*figures, "123.5", "TFLOP/s", "98.7%"]
    assert "left out" in text.getvalue()


def test_summary_warns_of_unsteady_times():
    rows = [summary_row("sum", "joint", 1, 1, 1), summary_row("sum", "dgl_ext", 0.9, 0.8, 0.95)]
    assert not any("Unsteady" in sentence for sentence in fusion_report.describe(rows))
    rows[1]["p80_us"] = 200
    assert fusion_report.describe(rows)[-1].startswith("Unsteady: in 1 of 2 rows p80 is more than")


def test_summary_warns_of_other_processes():
    rows = [summary_row("sum", "joint", 1, 1, 1)]
    assert not any(
        "Busy" in sentence for sentence in fusion_report.describe(rows, foreign_load=0.01)
    )
    assert "took 25% of the CPUs" in fusion_report.describe(rows, foreign_load=0.25)[-1]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the CPUs' clocks are in /proc/stat")
def test_foreign_load_sees_another_process():
    spin = "import time; end = time.time() + 30\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        with harness.ForeignLoad() as foreign:
            time.sleep(0.5)
    finally:
        other.kill()
        other.wait()
    assert foreign.share > 0.3 / os.cpu_count()


def test_foreign_load_leaves_out_this_process_and_adds_up(monkeypatch):
    clocks = iter([(0, 0, 0), (1, 3, 8), (5, 9, 9), (5, 9, 17)])  # own, all, passed
    monkeypatch.setattr(harness.ForeignLoad, "_clocks", staticmethod(lambda: next(clocks)))
    load = harness.ForeignLoad()
    for _ in range(2):
        with load:
            pass
    assert load.share == 2 / 16


def test_foreign_load_is_unknown_without_proc(monkeypatch):
    def no_file(*_, **__):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(Path, "read_text", no_file)
    with harness.ForeignLoad() as load:
        pass
    assert load.share is None


def test_passes_add_up_and_a_later_mistake_excludes(monkeypatch):
    timing = fusion_cells.Timing(["joint", "reference"])
    fusion_cells.measure(cell(), timing, 1e-9, min_rounds=2)
    fusion_cells.measure(cell(), timing, 1e-9, min_rounds=3)
    assert {key: len(times) for key, times in timing.times.items()} == {
        ("joint", "eager"): 5,
        ("reference", "eager"): 5,
    }
    with monkeypatch.context() as later:
        later.setitem(providers.PROVIDERS, "joint", broken("nan"))
        fusion_cells.measure(cell(), timing, 1e-9, min_rounds=1)
    fusion_cells.measure(cell(), timing, 1e-9, min_rounds=1)
    rows = fusion_cells.rows(cell(), timing, CEILING)
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert rows[1]["rounds"] == 7
    assert "ratio_to_joint" not in rows[1]

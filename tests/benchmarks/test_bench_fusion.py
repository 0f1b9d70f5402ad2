"""The fusion benchmark: what it refuses, what it writes, and how it computes its statistics."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgl_ext

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_fusion  # noqa: E402
import fusion_cells  # noqa: E402
import fusion_report  # noqa: E402
import harness  # noqa: E402
import problems  # noqa: E402
import providers  # noqa: E402

CPU = torch.device("cpu")
CEILING = harness.Ceiling(flops_per_second=1e11, bytes_per_second=1e10)
SIZE = (5, 8, 3)
MODES = ("step", "logits")
ON_CUDA = ("liger", "fused", "library")  # providers that the CPU leaves out


def cell(fusion="concat", dtype=torch.float32, mode="logits"):
    return fusion_cells.Cell(mode, fusion, SIZE, CPU, dtype)


def measured_rows(names, mode="logits"):
    timing, here = fusion_cells.Timing(names), cell(mode=mode)
    fusion_cells.measure(here, timing, 0.01)
    return fusion_cells.rows(here, timing, CEILING)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One `--smoke` run as a user starts it, from another folder: text and paths less endings."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(BENCHMARKS / "bench_fusion.py"), "--smoke", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", "results"],
        cwd=folder,
        # Threads wait for each other on a busy machine, and compiling has a test of its own.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stems = {mode: folder / "results" / f"bench_fusion_{mode}_cpu_float32_smoke" for mode in MODES}
    return done.stdout, stems


@pytest.mark.parametrize("mode", MODES)
def test_smoke_csv(smoke, mode):
    with smoke[1][mode].with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fusion"], row["provider"]) for row in rows] == [
        (fusion, name) for fusion in problems.FUSIONS for name in providers.PROVIDERS[mode]
    ]
    must_run = {"joint", "two_pass", "reference"}
    if dgl_ext._ops.extension.available():
        must_run |= {"dgl_ext", "dgl_ext_logits"}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        must_run.add("linear_cross_entropy")
    for row in rows:
        assert row["status"] == "ok" if row["provider"] in must_run else row["status"]
        if row["status"] != "ok":
            assert row["status"] == "left out"
            assert row["note"]
            continue
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["rounds"]) >= harness.MIN_ROUNDS
        assert (row["execution"], row["launches"]) == ("eager", "")
        assert float(row[f"ratio_to_{row['provider']}"]) == 1
        for column in ("ratio_to_joint", "ratio_to_two_pass", "gflops_per_s", "gbytes_per_s"):
            assert 0 < float(row[column]) < math.inf
        assert float(row["share_of_ceiling"]) > 0
        assert row["bound"] in ("compute", "memory")


@pytest.mark.parametrize("mode", MODES)
def test_smoke_json(smoke, mode):
    document = json.loads(smoke[1][mode].with_suffix(".json").read_text())
    for key in ("date", "cpu", "threads", "gpu", "torch", "cuda", "git_sha", "dgl_ext"):
        assert key in document["environment"]
    assert document["environment"]["torch"] == torch.__version__
    assert document["ceiling"]["flops_per_second"] > 0
    assert document["statistic"] == harness.STATISTIC
    assert len(document["rows"]) == len(problems.FUSIONS) * len(providers.PROVIDERS[mode])
    assert (document["mode"], document["step"]) == (mode, bench_fusion.WHAT[mode])


def broken(kind, mode="logits"):
    """A provider that is the reference but for one mistake."""

    def build(problem):
        right = providers.PROVIDERS[mode]["reference"].build(problem)

        def step():
            outputs = right()
            if kind in ("scaled gradients", "zeroed gradients"):
                for leaf in problem.leaves().values():
                    leaf.grad.mul_(1.001 if kind == "scaled gradients" else 0)
            elif kind == "no gradient":
                problem.features[1].grad = None
            elif kind == "unimodal outputs swapped":
                return (outputs[0], outputs[2], outputs[1])
            elif kind == "too few outputs":
                return outputs[:2]
            elif kind == "wrong shape":
                return (outputs[0][:1], *outputs[1:])
            elif kind == "nan":
                return (outputs[0] * math.nan, *outputs[1:])
            return outputs

        return step

    return providers.Provider(build)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("scaled gradients", r"features\[0\].grad differs from the reference by 1.0e-03"),
        ("zeroed gradients", r"features\[0\].grad differs"),
        ("no gradient", r"features\[1\].grad is missing"),
        ("unimodal outputs swapped", r"logits\[1\] differs"),
        ("too few outputs", r"logits\[2\] is missing"),
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
    monkeypatch.setitem(providers.PROVIDERS["logits"], "broken", broken(kind))
    rows = measured_rows(["broken", "reference"])
    assert timed == [("reference", "eager")]
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "median_us" not in rows[0]
    assert re.search(named, rows[0]["note"])


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("scaled gradients", r"features\[0\].grad differs from the reference by 1.0e-03"),
        ("unimodal outputs swapped", r"losses\[1\] differs"),
        ("too few outputs", r"losses\[2\] is missing"),
        ("nan", r"losses\[0\] differs from the reference by nan"),
    ],
)
def test_a_wrong_step_is_not_timed(monkeypatch, kind, named):
    monkeypatch.setitem(providers.PROVIDERS["step"], "broken", broken(kind, "step"))
    rows = measured_rows(["broken", "reference"], "step")
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert re.search(named, rows[0]["note"])


def test_a_wrong_or_failing_provider_ends_the_run_with_an_error(monkeypatch, tmp_path, capsys):
    def fails(problem):
        raise ValueError("no such kernel")

    listed = providers.PROVIDERS["step"]
    monkeypatch.setitem(listed, "broken", broken("zeroed gradients", "step"))
    monkeypatch.setitem(listed, "fails", providers.Provider(fails))
    flags = ["--mode", "step", "--smoke", "--device", "cpu", "--fusion", "sum", "--sizes", "5x8x3"]
    flags += ["--out", str(tmp_path)]
    assert bench_fusion.main([*flags, "--providers", "joint,broken"]) == 1
    assert "broken is wrong at every cell: features[0].grad differs" in capsys.readouterr().out
    assert bench_fusion.main([*flags, "--providers", "fails"]) == 1
    assert "fails failed at every cell: ValueError: no such kernel" in capsys.readouterr().out
    assert bench_fusion.main([*flags, "--providers", "joint,reference"]) == 0


@pytest.mark.filterwarnings("ignore:dgl_ext runs its slower reference")
@pytest.mark.parametrize(
    ("mode", "name"), [("logits", "dgl_ext"), ("step", "dgl_ext"), ("step", "dgl_ext_logits")]
)
def test_dgl_ext_is_left_out_rather_than_timed_as_the_reference(monkeypatch, mode, name):
    monkeypatch.setattr(dgl_ext._ops.extension, "available", lambda *_: False)
    with pytest.raises(providers.Unavailable, match=r"takes the reference for cpu torch.float32"):
        providers.PROVIDERS[mode][name].build(cell().problem())


def results_of(here, name):
    return fusion_cells.snapshot(here.mode, name, here.problem())[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", problems.FUSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_all_agree_with_the_reference_in_float64_and_joint_does_not(mode, fusion, dtype):
    here = cell(fusion, dtype, mode)
    truth = fusion_cells.snapshot(mode, "reference", here.problem().as_float64())[1]
    names = set(providers.PROVIDERS[mode]) - {"joint", "compiled", *ON_CUDA}
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        names.discard("linear_cross_entropy")
    for name in names:
        wrong = fusion_cells.difference(results_of(here, name), truth, dtype, everything=True)
        assert not wrong, name
    joint = results_of(here, "joint")
    assert not fusion_cells.difference(joint, truth, dtype, everything=False)
    gradients = {name: value for name, value in truth.items() if "grad" in name}
    assert len(truth) - len(gradients) == 3
    assert "features[0].grad differs" in fusion_cells.difference(
        joint, gradients, dtype, everything=True
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fusion", "concat,gated"], "expected some of concat, sum, film; got 'gated'"),
        (["--providers", "joint,other"], "got 'other'"),
        (["--sizes", "64x512"], "expected batch x width x classes as in .*; got '64x512'"),
        (["--sizes", "64x512x0"], "got '64x512x0'"),
        (["--sizes", "64x512x6,ax2x3"], "got 'ax2x3'"),
        (["--sizes", ""], "got ''"),
        (["--seconds", "0"], "expected a number of seconds above 0; got '0'"),
        (["--seconds", "nan"], "got 'nan'"),
        (["--seconds", "fast"], "got 'fast'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "cpu", "--dtype", "tf32"], "--dtype: tf32 needs --device cuda, got cpu"),
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
        (["--mode", "some"], "invalid choice: 'some'"),
        (
            ["--mode", "logits", "--providers", "joint,dgl_ext_logits"],
            "--providers: expected some of joint, .* in mode logits; got 'dgl_ext_logits'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        bench_fusion.main(flags)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def summary_row(fusion, provider, ratio, p20, p80):
    row = {"fusion": fusion, "batch": 64, "width": 512, "classes": 6, "provider": provider}
    row |= {"execution": "eager", "launches": None, "status": "ok", "note": ""}
    row |= {"p20_us": 90, "p80_us": 110}
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
    assert "less in 1 of 4 cells, more in 1, undecided in 2" in sentence
    assert "It takes more at concat 64x512x6 by 32%." in sentence

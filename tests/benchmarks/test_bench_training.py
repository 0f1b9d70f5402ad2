"""The benchmark of whole training steps: right providers, honest figures, files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dgl_ext

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_training  # noqa: E402
import harness  # noqa: E402
import training_child  # noqa: E402
import training_steps  # noqa: E402

CPU = torch.device("cpu")
NAMES = list(training_steps.PROVIDERS)


def cell(network="digits", fusion="concat", dtype_name="float64"):
    if "resnet" in network:
        pytest.importorskip("PIL")
    return bench_training.Cell(network, fusion, 5, CPU, dtype_name)


@pytest.mark.parametrize("network", ["digits", "tiny_resnet18"])
@pytest.mark.parametrize("dtype_name", ["float64", "float32"])
def test_all_providers_are_right(network, fusion, dtype_name):
    steps, excluded = bench_training.right_steps(cell(network, fusion, dtype_name))
    assert list(steps) == NAMES
    assert excluded == {}


def test_a_step_leaves_the_weights_as_they_are_and_uses_the_optimiser():
    training = cell().training()
    before = [p.detach().clone() for p in training.parameters]
    step = training_steps.PROVIDERS["dgl_ext"](training)
    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))
    assert len(training.optimizer.state) == len(before)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda training: setattr(training.head, "encoder_leak", 1.0), "encoders."),
        (lambda training: setattr(training.head, "head_leak", 0.5), "head."),
        (lambda training: training.inputs[0].mul_(2), "loss[0]"),
    ],
)
def test_a_wrong_provider_is_not_timed(monkeypatch, spoil, told):
    def wrong(training):
        spoil(training)
        return training_steps._dgl_ext(training)

    monkeypatch.setitem(training_steps.PROVIDERS, "dgl_ext", wrong)
    steps, excluded = bench_training.right_steps(cell())
    assert list(steps) == ["joint", "two_pass"]
    assert excluded["dgl_ext"][0] == "wrong"
    assert told in excluded["dgl_ext"][1]


def test_a_crash_is_a_row_and_an_exit_status(monkeypatch, tmp_path):
    def crash(training):
        raise RuntimeError("no such head")

    monkeypatch.setitem(training_steps.PROVIDERS, "dgl_ext", crash)
    monkeypatch.setattr(training_child, "ask", lambda request: {"peaks": [100]})
    arguments = ["--smoke", "--fusion", "sum", "--device", "cpu", "--out", str(tmp_path)]
    assert bench_training.main(arguments) == 1
    rows = json.loads((tmp_path / "bench_training_cpu_float32_smoke.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert "no such head" in rows[2]["note"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One `--smoke` run: what it printed, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("smoke") / "results"
    printed = io.StringIO()
    arguments = ["--smoke", "--device", "cpu", "--fusion", "film", "--out", str(folder)]
    with contextlib.redirect_stdout(printed):
        assert bench_training.main(arguments) == 0, printed.getvalue()
    return printed.getvalue(), folder


@pytest.mark.slow
@pytest.mark.gate
def test_smoke_files(smoke):
    stem = "bench_training_cpu_float32_smoke"
    document = json.loads((smoke[1] / f"{stem}.json").read_text())
    with (smoke[1] / f"{stem}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["provider"] for row in document["rows"]] == NAMES
    for row, line in zip(document["rows"], table, strict=True):
        assert row["status"] == line["status"] == "ok"
        assert row["rounds"] >= harness.MIN_ROUNDS
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["peak_bytes"] > 0
        assert float(line["ratio_to_joint"]) == row["ratio_to_joint"]
    joint, two_pass, own = document["rows"]
    assert joint["ratio_to_joint"] == joint["peak_ratio_to_joint"] == 1
    assert own["peak_ratio_to_two_pass"] == own["peak_bytes"] / two_pass["peak_bytes"]
    assert document["environment"]["dgl_ext"] == dgl_ext.__version__


def test_the_benchmarks_resnet_is_that_of_the_example():
    pytest.importorskip("PIL")
    training = bench_training.Cell("tiny_resnet18", "concat", 2, CPU, "float32").training()
    kinds = [module for module in training.encoders.modules() if isinstance(module, nn.Conv2d)]
    assert len(kinds) == 2 * 20  # ResNet-18: 17 and 3 on shortcuts

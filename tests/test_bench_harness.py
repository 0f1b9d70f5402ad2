"""How the benchmarks measure: blocks, rounds, ratios, ceilings, other processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness

CPU = torch.device("cpu")
CEILING = harness.Ceiling(flops_per_second=1e11, bytes_per_second=1e10)


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


def test_time_alone_goes_on_for_the_time_and_the_steps_asked():
    calls = []
    times = harness.time_alone(lambda: calls.append(1), CPU, 1e-9, min_steps=3)
    assert len(times) == len(calls) == 3
    times = harness.time_alone(lambda: time.sleep(0.01), CPU, 0.05)
    assert 2 <= len(times) <= 5
    assert all(value >= 10_000 for value in times)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the CPUs' clocks are in /proc/stat")
def test_children_that_have_ended_are_no_foreign_load():
    before, busy, _ = harness.ForeignLoad._clocks()
    subprocess.run([sys.executable, "-c", "for _ in range(5_000_000): pass"], check=True)
    after, busy_after, _ = harness.ForeignLoad._clocks()
    assert after - before > 0.05
    assert after - before <= busy_after - busy + 0.05

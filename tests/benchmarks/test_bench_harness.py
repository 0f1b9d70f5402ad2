"""How the benchmarks measure: blocks, rounds, ratios, ceilings, other processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import harness

CPU = torch.device("cpu")


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


def test_time_alone_goes_on_for_the_time_and_the_steps_asked():
    calls = []
    times = harness.time_alone(lambda: calls.append(1), CPU, 1e-9, min_steps=3)
    assert len(times) == len(calls) == 3
    times = harness.time_alone(lambda: time.sleep(0.01), CPU, 0.05)
    assert 2 <= len(times) <= 5
    assert all(value >= 10_000 for value in times)

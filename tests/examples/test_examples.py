"""The examples run and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    pytest.importorskip("sklearn")
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")],
        cwd=tmp_path_factory.mktemp("quickstart"),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout


def accuracies(text, way):
    """Fused, upper and lower accuracy in percent from the table's line."""
    line = re.search(rf"^{way} +([\d.]+)% +([\d.]+)% +([\d.]+)%$", text, re.MULTILINE)
    assert line, text
    return [float(value) for value in line.groups()]


def test_quickstart_trains_both_ways(quickstart):
    dgl, joint = accuracies(quickstart, "DGL"), accuracies(quickstart, "joint")
    # Untrained encoders under a trained head reach less than 85 here.
    assert 93 < dgl[0] <= 100
    assert 93 < joint[0] <= 100


def test_quickstart_dgl_trains_each_encoder_for_itself(quickstart):
    dgl, joint = accuracies(quickstart, "DGL"), accuracies(quickstart, "joint")
    assert min(dgl[1:]) > 60
    assert max(joint[1:]) < min(dgl[1:])


def test_quickstart_claims_what_it_measured(quickstart):
    dgl, joint = accuracies(quickstart, "DGL"), accuracies(quickstart, "joint")
    said = re.search(r"DGL minus joint is ([+-][\d.]+) points", quickstart)
    assert said
    assert float(said[1]) == pytest.approx(dgl[0] - joint[0], abs=0.11)
    assert "joint training is as good or better" in quickstart
    assert dgl[0] < joint[0] + 1

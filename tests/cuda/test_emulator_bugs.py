"""The emulator's suite must notice every defect that is planted in the kernels."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from emulator import planted
from emulator.workshop import Workshop

pytestmark = [pytest.mark.emulator, pytest.mark.slow]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    if not shutil.which("cmake"):
        pytest.skip("planting bugs needs cmake and a C++ compiler")
    return Workshop(tmp_path_factory.mktemp("planted"))


@pytest.mark.gate
def test_sound_kernels_pass(workshop):
    assert json.loads(workshop.failures(None)) == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.gate if name in planted.SHORT_LIST else ())
        for name in planted.BY_NAME
    ],
)
def test_planted_bug_is_found(workshop, name):
    bug = planted.BY_NAME[name]
    failures = json.loads(workshop.failures(bug))
    assert failures, f"nothing noticed: {name}"
    assert any(re.search(bug.report, failure) for failure in failures), failures[:3]

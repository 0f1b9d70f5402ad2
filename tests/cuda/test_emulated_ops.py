"""The ops' own tests over the CUDA binding and emulated kernels: all of CUDA that needs no GPU.

`tests/emulator/run_ops_tests.py` puts the binding in the place of the C++ extension, in a process
of its own. float32 cases with long sums are left out: they compare with the CPU's library, which
sums in more pieces than a thread of a kernel does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = Path(os.environ.get("DGL_EXT_CPP_TESTS", ROOT / "build" / "cpp")) / "emulated_ops.so"
NAMES = ["equivalence", "semantics", "edges", "opcheck", "dtypes", "errors", "present"]
FILES = [f"tests/heads/test_{name}.py" for name in NAMES]
STEP_NAMES = [
    "step_equivalence", "step_weights", "step_autograd", "step_errors",
    "loss_backward",
]  # fmt: skip
STEP_FILES = [f"tests/step/test_{name}.py" for name in STEP_NAMES]
SELECTION = "not slow and not leading3 and not lose_bits"
# On CUDA the first is a device-side assertion, and the second is not looked for.
STEP_SELECTION = "not out_of_range and not weight_that_is_no_weight and not nothing_of_their_size"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/emulator/run_ops_tests.py", str(MODULE), "-q", *arguments]
    # The library that they compare with sums in as many pieces as it has threads.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def module_is_built():
    assert MODULE.exists(), f"{MODULE} is missing: make cpp-tests"


@pytest.mark.emulator
def test_the_ops_pass_their_tests_on_emulated_cuda():
    done = run(*FILES, "-k", SELECTION, "-m", "not slow")
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 700


@pytest.mark.emulator
def test_the_training_steps_pass_their_tests_on_emulated_cuda():
    done = run(*STEP_FILES, "-k", STEP_SELECTION)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 500


@pytest.mark.emulator
def test_a_target_out_of_range_is_a_device_side_assertion():
    done = run("tests/step/test_step_errors.py", "-k", "out_of_range_is_named and concat")
    assert "device-side assertion: target in [0, classes)" in done.stdout


@pytest.mark.emulator
@pytest.mark.slow
@pytest.mark.gate
def test_bias_gradients_over_many_rows_do_not_lose_bits_on_emulated_cuda():
    done = run("tests/heads/test_dtypes.py", "-k", "lose_bits and concat")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


@pytest.mark.emulator
@pytest.mark.parametrize("bound", ["1", "several", "0"])
def test_the_bound_on_the_grid_is_read_or_refused(bound, monkeypatch):
    monkeypatch.setenv("DGL_EXT_MAX_CTAS", bound)
    done = run("tests/heads/test_equivalence.py", "-k", "leaks_agree and concat")
    if bound == "1":
        assert done.returncode == 0, done.stdout[-4000:]
        assert "8 passed" in done.stdout
    else:
        assert f'DGL_EXT_MAX_CTAS: expected a positive int, got "{bound}"' in done.stdout


@pytest.mark.emulator
@pytest.mark.parametrize("limit", ["3", "3,stubborn"])
def test_a_cooperative_launch_that_no_longer_fits_runs_all_the_same(limit, monkeypatch):
    """By asking the GPU again; and where the answer does not help, by the library."""
    monkeypatch.setenv("DGL_EXT_EMULATED_LIMIT", limit)
    monkeypatch.setenv("DGL_EXT_LOG", "plan")
    done = run(
        "tests/step/test_step_equivalence.py", "-s", "-k", "sizes_of_a_real_head and fused and 34"
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "6 passed" in done.stdout
    executors = set(re.findall(r"step \S+: (\w+)", done.stderr))
    assert executors == ({"fused", "library"} if "stubborn" in limit else {"fused"})


@pytest.mark.emulator
def test_plans_are_logged_once_for_each_shape(monkeypatch):
    monkeypatch.setenv("DGL_EXT_LOG", "plan")
    done = run(
        "tests/step/test_step_equivalence.py", "-s", "-k", "sizes_of_a_real_head and 34 and one"
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("dgl_ext::")]
    assert len(lines) == len(set(lines))
    pattern = (
        r"dgl_ext::linear_head_step 64x96\+64x34: (fused, tile \w+( unaligned)?|library), "
        r"grid \d+, workspace \d+ bytes, splits \d+, \d+, chunks \d+ of \d+ rows"
    )
    assert {"fused", "library"} <= {
        found[1].split(",")[0] for line in lines if (found := re.fullmatch(pattern, line))
    }


CALLS = """
import sys
sys.path.insert(0, "tests/emulator")
from run_ops_tests import EmulatedOps
sys.meta_path.insert(0, EmulatedOps(sys.argv[1]))
import dgl_ext
print(dgl_ext._C.__file__)
"""


def test_the_module_under_test_is_the_emulated_one():
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(MODULE)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "emulated_ops.so" in done.stdout

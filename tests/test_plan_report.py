"""What `dgl_ext.plan` and `python -m dgl_ext --plan` say of the CUDA kernels, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgl_ext import plan
from dgl_ext.heads import HEADS

ROOT = Path(__file__).resolve().parents[1]


def test_tiles_are_those_of_the_kernels():
    header = (ROOT / "csrc" / "plan.h").read_text()
    names = re.search(r"enum class Tile \{(.*?)\};", header, re.DOTALL)[1].split(",")
    in_cpp = [name.strip().removeprefix("k") for name in names if name.strip()]
    in_python = [tile.replace("_", "").replace("tf32", "tfloat32") for tile in plan.TILES]
    assert [name.lower() for name in in_cpp] == in_python


def test_nominal_residency_is_what_registers_are_limited_for():
    header = (ROOT / "csrc" / "plan.h").read_text()
    table = re.search(r"kTileShapes\[kTileCount\] = \{(.*?)\n\};", header, re.DOTALL)[1]
    limits = re.findall(r"^ *\{.*, (\d+), (?:true|false)\},", table, re.MULTILINE)
    assert tuple(map(int, limits)) == plan.NOMINAL.resident_ctas


@pytest.mark.parametrize("fusion", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_head_has_a_plan(fusion, dtype):
    launches = plan.plan(fusion, 64, (512, 512), 309, dtype=dtype)
    for launch in launches:
        assert launch.path == "kernel"
        assert 1 <= launch.grid <= 132 * max(plan.NOMINAL.resident_ctas)
        assert launch.workspace_bytes >= 0


def test_a_plan_depends_on_size_dtype_and_device():
    small = plan.plan("concat", 64, (512, 512), 6)
    assert small.forward.tile == "float32_small"
    assert plan.plan("concat", 64, (512, 512), 6, dtype=torch.float16).forward.tile == "half_small"
    assert plan.plan("concat", 1024, (2048, 2048), 1000).forward.tile == "float32_medium"
    allowed = plan.plan("concat", 64, (512, 512), 6, allow_tf32=True)
    assert allowed.forward.tile == "tf32_small"
    large = plan.plan("concat", 4096, (2048, 2048), 1000, dtype=torch.bfloat16)
    assert (large.forward.path, large.backward.path) == ("composed", "composed")
    old = plan.NOMINAL._replace(capability=75)
    assert plan.plan("concat", 64, (512, 512), 6, device=old).forward.path == "composed"


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"fusion: expected one of .*, got 'mlp'"):
        plan.plan("mlp", 1, (2, 2), 3)
    with pytest.raises(ValueError, match=r'widths: expected 2 entries for fusion="film", got 3'):
        plan.plan("film", 1, (2, 2, 2), 3)
    with pytest.raises(RuntimeError, match=r"cuda_plan: dtype: expected float64, .*, got int8"):
        plan.plan("sum", 1, (2, 2), 3, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"sizes of 0 or more, got a negative one"):
        plan.plan("sum", -1, (2, 2), 3)
    short = plan.NOMINAL._replace(resident_ctas=(1,))
    with pytest.raises(RuntimeError, match=r"device: expected 10 entries, got 3"):
        plan.plan("sum", 1, (2, 2), 3, device=short)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgl_ext", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_line_shows_a_plan():
    shown = command("--plan", "concat", "64", "512,512", "309", "--dtype", "bfloat16")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^forward   kernel: tile half_small 32x32x64, \d+ CTAs", shown.stdout, re.M)
    assert re.search(r"^backward  kernel: .* workspace [\d,]+ bytes$", shown.stdout, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("film", "64", "512", "6"), 'widths: expected 2 entries for fusion="film", got 1'),
        (("concat", "many", "512", "6"), "invalid literal for int()"),
        (("concat", "4", "512", "-6"), "expected sizes of 0 or more, got a negative one"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message):
    shown = command("--plan", *arguments)
    assert shown.returncode == 2
    assert message in shown.stderr

"""Every kernel with plain nvcc: no warning, no spill, registers as recorded, sound SASS.

`python tests/test_cuda_compile.py` records the table anew, for the nvcc that it finds.
"""

from __future__ import annotations

import json
import re
import shutil
import site
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("cuda_resources.json")
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
UNITS = ["linear_head", "film_head"]
TILES = (
    "float64 float32_small float32_large tf32_small tf32_large half_small half_large half_xlarge"
)
MARGIN = 8  # registers more than recorded: another nvcc may allocate a little differently
KERNEL = re.compile(r"head_kernelINS_\d+(\w+?)ENS_6ConfigI(.+?)LNS_4TileE(\d)ELb([01])")
DTYPES = {"d": "float64", "f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


def kernel_name(mangled: str) -> str | None:
    match = KERNEL.search(mangled)
    if not match:
        return None
    head, dtype, tile, aligned = match.groups()
    parts = [head, DTYPES[dtype], TILES.split()[int(tile)], ["unaligned", "aligned"][int(aligned)]]
    return " ".join(parts)


@lru_cache
def compile_unit(unit: str, architecture: str, folder: str) -> tuple[str, Path]:
    """The messages of nvcc and ptxas, and the cubin."""
    cubin = Path(folder) / f"{unit}.{architecture}.cubin"
    command = [
        "nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch={architecture}", "-cubin",
        "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas",
        "-I", "csrc", "-I", "csrc/cuda", f"csrc/cuda/{unit}.cu", "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr + done.stdout, cubin


def resources(messages: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes by kernel."""
    found, name = {}, None
    for line in messages.splitlines():
        if "Compiling entry function" in line:
            name = kernel_name(line)
        elif name and (spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes", line)):
            found[name] = {"spilled": int(spills[1]) + int(spills[2])}
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(used[1])
    return found


def disassembler() -> str | None:
    if on_path := shutil.which("nvdisasm"):
        return on_path
    for folder in site.getsitepackages():
        for tool in sorted(Path(folder).glob("nvidia/**/bin/nvdisasm")):
            return str(tool)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH: the CUDA kernels were not compiled")
    return str(tmp_path_factory.mktemp("cubin"))


units = pytest.mark.parametrize("unit", UNITS)
architectures = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in ARCHITECTURES],
)


@architectures
@units
def test_no_warning_no_spill_registers_as_recorded(folder, unit, architecture):
    messages, _ = compile_unit(unit, architecture, folder)
    assert "warning" not in messages, messages[-4000:]
    used = resources(messages)
    recorded = json.loads(TABLE.read_text())[architecture][unit]
    assert set(used) == set(recorded), "the list of kernels changed: record the table anew"
    assert {k: v["spilled"] for k, v in used.items() if v["spilled"]} == {}
    grown = {k: (recorded[k], v["registers"]) for k, v in used.items()
             if v["registers"] > recorded[k] + MARGIN}  # fmt: skip
    assert grown == {}, "registers, recorded and now"


@architectures
@units
def test_machine_code(folder, unit, architecture):
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm (PyPI: nvidia-cuda-nvdisasm)")
    _, cubin = compile_unit(unit, architecture, folder)
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),", text.stdout, flags=re.M)
    code = {kernel_name(n): body for n, body in zip(sections[1::2], sections[2::2])}  # noqa: B905
    code.pop(None, None)
    assert code
    for name, body in code.items():
        assert not re.search(r"\b(LDL|STL)\b", body), f"{name}: local memory"
        assert not re.search(r"LDG\S*\.CONSTANT", body), f"{name}: non-coherent load"
        assert not re.search(r"\b(RED|ATOM|ATOMG)\S*\.(F16|F32|F64|BF16)", body), f"{name}: atomics"
        if "half" in name or "tf32" in name:
            assert "HMMA" in body, f"{name}: no tensor core instruction"


def record(folder: str):
    table = {}
    for architecture in ARCHITECTURES:
        table[architecture] = {}
        for unit in UNITS:
            used = resources(compile_unit(unit, architecture, folder)[0])
            table[architecture][unit] = {k: v["registers"] for k, v in sorted(used.items())}
            print(architecture, unit, "spilled:", {k: v for k, v in used.items() if v["spilled"]})
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        record(temporary)
    sys.exit()

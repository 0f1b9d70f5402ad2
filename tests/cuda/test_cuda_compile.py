"""Every kernel with plain nvcc: no warning, no spill, resources as recorded, sound SASS.

`python tests/cuda/test_cuda_compile.py` records the table anew, for the nvcc that it finds. Shared
memory does not depend on the architecture, and all of it is asked for at the launch: its sizes come
from the kernels' structs, by way of the emulator's module.
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
from emulator import harness

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.json")
CUDA_MODULE = json.loads((ROOT / "csrc/sources.json").read_text())["modules"]["_C_cuda"]
PTX = {f"sm_{n}": p for p, names in CUDA_MODULE["architectures"].items() for n in names}
ARCHITECTURES = list(PTX)
UNITS = {  # and the heads whose kernels are in them
    "linear_head": ("LinearForward", "LinearBackward"),
    "linear_step": ("LinearStep",),
    "film_head": ("FilmForward", "FilmBackward"),
    "film_step": ("FilmStep",),
}
TILES = "float64 float32_small float32_medium tf32_small tf32_medium half_small half_medium"
MARGIN = 8  # registers more than recorded: another nvcc may allocate a little differently
# Shared memory of one multiprocessor and the most that one CTA may ask for (CUDA C++ Programming
# Guide, technical specifications by compute capability). Each CTA takes RESERVED bytes more.
SHARED = {
    "sm_80": (164 << 10, 163 << 10),
    "sm_90": (228 << 10, 227 << 10),
    "sm_100": (228 << 10, 227 << 10),
    "sm_120": (100 << 10, 99 << 10),
}
RESERVED = 1 << 10
KERNEL = re.compile(r"head_kernelINS_\d+(\w+?)ENS_6ConfigI(.+?)LNS_4TileE(\d)ELb([01])")
DTYPES = {"d": "float64", "f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


def kernel_name(mangled: str) -> str | None:
    match = KERNEL.search(mangled)
    if not match:
        return None
    head, dtype, tile, aligned = match.groups()
    parts = [head, DTYPES[dtype], TILES.split()[int(tile)], ["unaligned", "aligned"][int(aligned)]]
    return " ".join(parts)


pytestmark = [pytest.mark.slow, pytest.mark.gate]


def nvcc(*arguments: str | Path) -> str:
    """What nvcc and the tools that it runs print."""
    done = subprocess.run(["nvcc", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr + done.stdout


@lru_cache
def compile_ptx(unit: str, virtual: str, folder: str) -> tuple[str, Path]:
    """The messages of nvcc, and the PTX."""
    ptx = Path(folder) / f"{unit}.{virtual}.ptx"
    source = next((ROOT / "csrc").glob(f"cuda/*/{unit}.cu"))
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas", "-I", "csrc"]
    return nvcc(*flags, f"-arch=compute_{virtual}", "-ptx", source, "-o", ptx), ptx


@lru_cache
def compile_unit(unit: str, architecture: str, folder: str) -> tuple[str, Path]:
    """The messages of nvcc and ptxas, and the cubin."""
    said, ptx = compile_ptx(unit, PTX[architecture], folder)
    cubin = ptx.with_suffix(f".{architecture}.cubin")
    return said + nvcc("-cubin", f"-arch={architecture}", "-Xptxas", "-v", ptx, "-o", cubin), cubin


def resources(messages: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and static shared memory by kernel."""
    found, name = {}, None
    for line in messages.splitlines():
        if "Compiling entry function" in line:
            name = kernel_name(line)
        elif name and (spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes", line)):
            found[name] = {"spilled": int(spills[1]) + int(spills[2])}
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(used[1])
            static = re.search(r"(\d+) bytes smem", line)
            found[name]["static"] = int(static[1]) if static else 0
    return found


def launches() -> dict[str, tuple[int, int]] | None:
    """By kernel: dynamic shared memory, and CTAs that a multiprocessor is meant to hold."""
    module = harness.load("emulated_kernels")
    if module is None:
        return None
    return {
        f"{head} {dtype.name} {tile.name} {'aligned' if aligned else 'unaligned'}": launch
        for head, kernels in module.kernels().items()
        for (dtype, tile, aligned), launch in kernels.items()
    }


def recorded_of(unit: str) -> dict[str, dict]:
    """The table's kernels that `unit` holds."""
    table = json.loads(TABLE.read_text())
    return {name: entry for name, entry in table.items() if name.split()[0] in UNITS[unit]}


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


def each(*units: str) -> list:
    """A worker of xdist takes all tests of a unit, whose PTX is compiled once."""
    return [pytest.param(unit, marks=pytest.mark.xdist_group(unit)) for unit in units]


units = pytest.mark.parametrize("unit", each(*UNITS))
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@architectures
@units
def test_no_warning_no_spill_resources_as_recorded(folder, unit, architecture):
    messages, _ = compile_unit(unit, architecture, folder)
    assert "warning" not in messages, messages[-4000:]
    used = resources(messages)
    recorded = {k: v["registers"][architecture] for k, v in recorded_of(unit).items()}
    assert set(used) == set(recorded), "the list of kernels changed: record the table anew"
    assert {k: v["spilled"] for k, v in used.items() if v["spilled"]} == {}
    grown = {k: (recorded[k], v["registers"]) for k, v in used.items()
             if v["registers"] > recorded[k] + MARGIN}  # fmt: skip
    assert grown == {}, "registers, recorded and now"
    static = {k: v["static"] for k, v in used.items() if v["static"]}
    assert static == {}, "shared memory that the launch does not ask for"


@architectures
@pytest.mark.parametrize("unit", each("scale_gradients", "linear_library", "film_library"))
def test_kernels_without_tiles_compile_without_a_warning_or_a_spill(folder, unit, architecture):
    messages, _ = compile_unit(unit, architecture, folder)
    assert "warning" not in messages, messages[-4000:]
    assert set(re.findall(r"(\d+) bytes spill", messages)) == {"0"}


@pytest.mark.parametrize("unit", each("linear_library", "film_library"))
def test_the_rows_kernels_load_16_bytes_at_once(folder, unit):
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm (PyPI: nvidia-cuda-nvdisasm)")
    _, cubin = compile_unit(unit, "sm_90", folder)
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),", text.stdout, flags=re.M)
    rows = [
        body
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
        if re.search(r"(Linear|Film)Rows", name)
    ]
    assert len(rows) == 4  # dtypes
    assert all(re.search(r"LDG\.E\S*\.128", body) for body in rows)


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


@pytest.fixture(scope="module")
def shared():
    found = launches()
    if found is None:
        pytest.skip("the emulator is not built (cmake -S tests/emulator -B build/cpp)")
    return found


@pytest.mark.emulator
def test_shared_memory_as_recorded(shared):
    recorded = {k: v["shared"] for k, v in json.loads(TABLE.read_text()).items()}
    assert set(shared) == set(recorded), "the list of kernels changed: record the table anew"
    grown = {k: (recorded[k], now) for k, (now, _) in shared.items() if now > recorded[k]}
    assert grown == {}, "shared memory in bytes, recorded and now"


@pytest.mark.emulator
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_leaves_room_for_the_ctas_that_registers_are_limited_for(
    shared, architecture
):
    in_all, of_one = SHARED[architecture]
    for name, (size, ctas) in shared.items():
        assert size <= of_one, name
        held = in_all // (size + RESERVED)
        if architecture == "sm_120":  # too little shared memory for more of these
            ctas = 1 if "medium" in name else min(ctas, 2) if "Step float64" in name else ctas
        assert held >= ctas, f"{name}: {held} CTAs fit, {ctas} wanted"


def record(folder: str):
    found = launches()
    if found is None:
        raise SystemExit("shared memory: build the emulator first (cmake -S . -B build/cpp)")
    table = {name: {"registers": {}, "shared": size} for name, (size, _) in sorted(found.items())}
    for architecture in ARCHITECTURES:
        for unit in UNITS:
            used = resources(compile_unit(unit, architecture, folder)[0])
            for name, entry in used.items():
                table[name]["registers"][architecture] = entry["registers"]
            print(architecture, unit, "spilled:", {k: v for k, v in used.items() if v["spilled"]})
    write(table)


def write(table: dict[str, dict]):
    """A kernel a line."""
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        record(temporary)
    sys.exit()

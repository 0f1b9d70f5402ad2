"""What the project's files promise of one another."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

import dgl_ext
from dgl_ext._ops import extension as _extension

ROOT = Path(__file__).resolve().parents[2]
SPEC = json.loads((ROOT / "csrc" / "sources.json").read_text())
MAX_LINES = 500


def sources(*folders: str) -> list[Path]:
    """Python and C++ files of the project in `folders`."""
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in files if path.suffix in suffixes]


def test_every_source_file_is_built() -> None:
    listed = [source for module in SPEC["modules"].values() for source in module["sources"]]
    found = [path.relative_to(ROOT).as_posix() for path in sources("csrc")]
    assert sorted(set(listed)) == sorted(name for name in found if name.endswith((".cpp", ".cu")))


def test_every_cpp_test_is_built() -> None:
    listed = [source for test in SPEC["cpp_tests"].values() for source in test]
    found = (ROOT / "tests" / "cpp").glob("*.cpp")
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in found)


def test_the_changelog_starts_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert versions[0] == dgl_ext.__version__


def test_every_file_agrees_on_the_oldest_torch() -> None:
    oldest = ".".join(map(str, _extension.MINIMUM_TORCH))
    assert f'dependencies = ["torch>={oldest}"]' in (ROOT / "pyproject.toml").read_text()
    backend = (ROOT / "build_backend" / "dgl_ext_backend.py").read_text()
    assert f"MINIMUM_TORCH = {_extension.MINIMUM_TORCH}" in backend
    major, minor = _extension.MINIMUM_TORCH
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in SPEC["defines"]


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX", "NotImplementedError"])
def test_nothing_is_left_for_later(word: str) -> None:
    files = sources("csrc", "dgl_ext", "build_backend", "benchmarks", "examples")
    assert [str(path) for path in files if word in path.read_text()] == []


def test_files_are_small_enough_to_read() -> None:
    files = sources("csrc", "dgl_ext", "build_backend", "tests", "benchmarks", "examples")
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, wherever it does."""
    module = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*module[: len(module) - node.level], *filter(None, (node.module or "").split("."))]
        for name in node.names:
            whole = ROOT.joinpath(*base, name.name)
            is_module = whole.with_suffix(".py").exists() or whole.is_dir()
            found.add(".".join([*base, name.name] if is_module else base))
    return found


def included(path: Path) -> set[str]:
    names = re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)
    return {f"csrc/{name}" for name in names if (ROOT / "csrc" / name).exists()}


def assert_no_cycle(edges: dict[str, set[str]]) -> None:
    assert any(edges.values())
    list(graphlib.TopologicalSorter(edges).static_order())


# From the lowest up: a file includes its own layer and those before it.
LAYERS = [
    ["common", "cpu"],
    ["common", "cuda/plan", "cuda/kernels", "cuda/library", "cuda/launchers", "cuda/binding"],
]


def test_imports_and_includes_go_one_way() -> None:
    modules = sources("dgl_ext")
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in modules}
    assert_no_cycle({names[p]: imported(p) for p in modules if p.name != "__init__.py"})
    includes = {p.relative_to(ROOT).as_posix(): included(p) for p in sources("csrc")}
    assert_no_cycle(includes)
    for layers in LAYERS:
        folders = tuple(f"csrc/{layer}/" for layer in layers)
        for i, folder in enumerate(folders):
            for file in (f for f in includes if f.startswith(folder)):
                assert all(f.startswith(folders[: i + 1]) for f in includes[file]), file


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) - {"cpp-tests"}
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z-]+)", printed.stdout, re.MULTILINE)) == targets


PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_links_between_files_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_make_targets_that_documents_name_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = re.findall(r"^\s*`?make ([a-z-]+)|`make ([a-z-]+)", (ROOT / name).read_text(), re.M)
    assert {a or b for a, b in named} <= targets


def test_every_public_name_is_documented() -> None:
    assert [name for name in dgl_ext.__all__ if not getattr(dgl_ext, name).__doc__] == []


def test_importing_starts_no_cuda_context() -> None:
    code = "import dgl_ext, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("named", [None, "", "9.0"])
def test_kernels_are_built_for_four_architectures_or_for_those_named(monkeypatch, named) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if named is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    build = runpy.run_path(str(ROOT / "setup.py"))
    module = build["extension"]("_C_cuda", build["SPEC"]["modules"]["_C_cuda"])
    flags = [flag for flag in module.extra_compile_args["nvcc"] if "arch" in flag]
    codes = {"80": ["sm_80", "sm_90"], "100": ["sm_100", "sm_120", "compute_100"]}
    ours = [f"-gencode=arch=compute_{p},code={c}" for p, names in codes.items() for c in names]
    assert flags == ([] if named else ours)  # torch adds its own where there are none
    assert build["BUILT_FOR"] == (named or "sm_80 sm_90 sm_100 sm_120 compute_100")

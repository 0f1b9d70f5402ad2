"""Builds and installs the package in fresh environments, as users do, and looks at what arrives."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILT = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "_build_info.json")
CACHES = ("__pycache__", ".*_cache", ".hypothesis")
# Torch counts as installed already; asking for another one would fetch gigabytes.
# Not torch.__version__, which may have a suffix that the release on an index lacks.
CONSTRAINT = f"torch=={importlib.metadata.version('torch')}"

pytestmark = [pytest.mark.packaging, pytest.mark.slow]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Output of a command; fails with it where the command fails."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


class Environment:
    """A fresh virtual environment that has the torch of this one, and pip."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        # Another torch costs minutes or gigabytes: a .pth file makes the one that runs these tests
        # visible, as if it were installed here. The environment's own packages come first.
        (self.site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        (folder / "constraint.txt").write_text(f"{CONSTRAINT}\n")

    def ask(self, code: str) -> str:
        """What `code` prints, away from the checkout."""
        return run(self.python, "-c", code, cwd=self.folder).strip()

    def pip(self, *words: str | Path, cwd: Path) -> str:
        """Output of `pip words`."""
        constraint = str(self.folder / "constraint.txt")
        return run(self.python, "-m", "pip", *words, cwd=cwd, PIP_CONSTRAINT=constraint)

    def smoke_test(self) -> None:
        """One step of each head through the installed package."""
        shutil.copy(ROOT / "tests" / "project" / "smoke.py", self.folder)
        assert "smoke test passed" in run(self.python, "smoke.py", cwd=self.folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, without what was built in it."""
    folder = tmp_path_factory.mktemp("source") / "dgl_ext"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*BUILT, *CACHES))
    return folder


@pytest.fixture(scope="session")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install .`, isolated."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", ".", cwd=source)
    return environment


@pytest.mark.gate
def test_isolated_install_works_from_another_directory(installed: Environment) -> None:
    installed.smoke_test()


@pytest.mark.gate
def test_the_wheel_serves_every_python_from_3_10(installed: Environment) -> None:
    (wheel,) = installed.site.glob("dgl_ext-*.dist-info/WHEEL")
    tags = [line for line in wheel.read_text().splitlines() if line.startswith("Tag:")]
    assert len(tags) == 1
    assert tags[0].startswith("Tag: cp310-abi3-")


def modules_built(installed: Environment) -> list[str]:
    info = json.loads((installed.site / "dgl_ext" / "_build_info.json").read_text())
    return info["modules"]


@pytest.mark.gate
def test_the_cuda_module_is_built_where_torch_and_nvcc_have_cuda(installed: Environment) -> None:
    expected = ["_C"]
    if torch.version.cuda and shutil.which("nvcc"):
        expected.append("_C_cuda")
    assert modules_built(installed) == expected


@pytest.mark.gate
def test_the_wheel_holds_the_package_and_nothing_else(installed: Environment) -> None:
    (record,) = installed.site.glob("dgl_ext-*.dist-info/RECORD")
    names = {Path(line.split(",")[0]) for line in record.read_text().splitlines()}
    package = {str(name) for name in names if name.parts[0] == "dgl_ext"}
    python = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dgl_ext").rglob("*.py")}
    extra = {"dgl_ext/_build_info.json", "dgl_ext/py.typed"}
    extra |= {f"dgl_ext/{module}.abi3.so" for module in modules_built(installed)}
    assert {name for name in package if not name.endswith(".pyc")} == python | extra
    assert {name.parts[0].split("-")[0] for name in names} == {"dgl_ext"}


@pytest.fixture
def library(installed: Environment) -> Path:
    """The compiled module; the tools that look into it come with the compiler."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("needs readelf and nm")
    return installed.site / "dgl_ext" / "_C.abi3.so"


@pytest.mark.gate
def test_the_library_needs_torch_and_the_system_alone(library: Path) -> None:
    dynamic = run("readelf", "-d", library, cwd=library.parent)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    names = {name.split(".so")[0] for name in needed}
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "ld-linux-x86-64"}
    assert names - system <= {"libtorch", "libtorch_cpu"}


@pytest.mark.gate
def test_the_library_uses_only_stable_symbols(library: Path) -> None:
    symbols = run("nm", "-D", "-C", "--undefined-only", library, cwd=library.parent)
    names = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if name.startswith(("at::", "c10::", "torch::"))] == []
    # What the limited API 3.10 offers, without a version in its name.
    assert {name for name in names if "Py" in name} <= {"PyModule_Create2"}
    exported = run("nm", "-D", "--defined-only", "--extern-only", library, cwd=library.parent)
    assert " T PyInit__C" in exported


@pytest.mark.gate
def test_the_build_is_recorded(installed: Environment) -> None:
    report = run(installed.python, "-m", "dgl_ext", cwd=installed.folder)
    assert f"with torch {torch.__version__}" in report
    assert "CUDA kernels:" in report


def test_a_wheel_can_be_built_from_the_sdist(
    source: Path, installed: Environment, tmp_path: Path
) -> None:
    hook = f"import dgl_ext_backend as b; print(b.build_sdist({str(tmp_path)!r}))"
    run(sys.executable, "-c", hook, cwd=source, PYTHONPATH="build_backend")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests | {"csrc/sources.json", "build_backend/dgl_ext_backend.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]

    installed.pip("wheel", archive, "--no-deps", "--wheel-dir", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert "dgl_ext/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("words", [["."], ["-e", "."], ["--no-build-isolation", "."]], ids=" ".join)
def test_installs_with_the_newest_pip(source: Path, tmp_path: Path, words: list[str]) -> None:
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--upgrade", "pip", "setuptools", "ninja", cwd=tmp_path)
    environment.pip("install", *words, cwd=source)
    environment.smoke_test()


def test_a_file_deleted_from_the_source_leaves_the_next_wheel(
    source: Path, installed: Environment, tmp_path: Path
) -> None:
    tree = tmp_path / "dgl_ext"
    shutil.copytree(source, tree)
    stale = tree / "dgl_ext" / "stale.py"
    stale.write_text("")
    contents = []
    for _ in range(2):
        installed.pip("wheel", ".", "--no-deps", "--wheel-dir", tmp_path, cwd=tree)
        (wheel,) = tmp_path.glob("*.whl")
        contents.append(zipfile.ZipFile(wheel).namelist())
        stale.unlink(missing_ok=True)
    assert "dgl_ext/stale.py" in contents[0]
    assert "dgl_ext/stale.py" not in contents[1]


def test_building_without_torch_says_what_is_needed(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    (environment.site / "torch.pth").unlink()
    environment.pip("install", "setuptools>=77", cwd=tmp_path)
    message = run(
        "bash",
        "-c",
        f"! {environment.python} setup.py build_ext --build-lib {tmp_path}/out 2>&1",
        cwd=source,
    )
    assert "dgl_ext cannot be built: torch cannot be imported" in message
    assert "install torch >= 2.10 first" in message

    # An isolated build asks for one.
    code = "import dgl_ext_backend as backend; print(backend.get_requires_for_build_wheel())"
    path = {"PYTHONPATH": "build_backend", "PATH": str(environment.python.parent)}
    asked = run(environment.python, "-c", code, cwd=source, **path)
    assert asked.strip() == "['torch>=2.10']"

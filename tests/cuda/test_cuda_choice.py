"""Whether CUDA is compiled, and the reason that the build records."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_choice import (  # noqa: E402
    Cublas,
    CudaChoice,
    Toolkit,
    choose,
    find_cublas,
    find_toolkit,
)

TOOLKIT = Toolkit("/toolkit", "13.0")


def test_cuda_is_compiled_where_torch_and_nvcc_agree() -> None:
    choice = choose("13.1", True, toolkit=TOOLKIT)
    assert choice == CudaChoice(True, "torch and nvcc are of CUDA 13.0", TOOLKIT)


CASES = [
    (None, True, TOOLKIT, "the torch that it was built against has no CUDA"),
    ("13.0", True, None, "torch was built for CUDA 13.0, but no nvcc was found"),
    ("12.8", True, TOOLKIT, "torch was built for CUDA 12.8, but nvcc is of CUDA 13.0"),
    ("13.0", False, TOOLKIT, "this version of dgl_ext has no CUDA kernels yet"),
]


@pytest.mark.parametrize(("torch_cuda", "has_kernels", "toolkit", "reason"), CASES)
def test_the_reason_against_cuda_is_given(
    torch_cuda: str | None, has_kernels: bool, toolkit: Toolkit | None, reason: str
) -> None:
    assert choose(torch_cuda, has_kernels, toolkit=toolkit) == CudaChoice(False, reason)
    with pytest.raises(RuntimeError, match=f"DGL_EXT_CUDA=1 was set, but {reason}"):
        choose(torch_cuda, has_kernels, request="1", toolkit=toolkit)


def test_cuda_can_be_forbidden() -> None:
    choice = choose("13.0", True, request="0", toolkit=TOOLKIT)
    assert choice == CudaChoice(False, "DGL_EXT_CUDA=0 was set")


def test_a_request_that_is_not_understood_raises() -> None:
    with pytest.raises(RuntimeError, match="DGL_EXT_CUDA must be 0 or 1, got 'yes'"):
        choose("13.0", True, request="yes", toolkit=TOOLKIT)


def test_the_toolkit_is_what_nvcc_says_and_not_the_folder_it_lies_in(tmp_path: Path) -> None:
    # A wrapper script on PATH, as distributions and module systems install.
    toolkit = tmp_path / "toolkit-12.9"
    toolkit.mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then\n'
        '  echo "Cuda compilation tools, release 12.9, V12.9.1"\n'
        "else\n"
        f'  echo "#$ TOP={toolkit}/bin/.." >&2\n'
        "fi\n"
    )
    nvcc.chmod(0o755)
    (toolkit / "bin").mkdir()
    assert find_toolkit({"PATH": str(nvcc.parent)}) == Toolkit(str(toolkit), "12.9")
    assert find_toolkit({"CUDA_HOME": str(tmp_path)}) == Toolkit(str(toolkit), "12.9")


def test_cublas_is_the_toolkits_or_that_of_torchs_packages(tmp_path: Path) -> None:
    toolkit, package = tmp_path / "toolkit", tmp_path / "nvidia" / "cu13"
    toolkit.mkdir()
    (package / "include").mkdir(parents=True)
    (package / "lib").mkdir()
    (package / "include" / "cublas_v2.h").touch()
    with pytest.raises(RuntimeError, match=r"cublas_v2\.h and libcublas\.so were not found in"):
        find_cublas([toolkit, package])
    (package / "lib" / "libcublas.so.13").touch()
    found = find_cublas([toolkit, package, tmp_path / "missing"])
    assert found == Cublas(f"{package}/include", f"{package}/lib", "libcublas.so.13")
    (toolkit / "lib64").mkdir()
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cublas_v2.h").touch()
    (toolkit / "lib64" / "libcublas.so").touch()
    found = find_cublas([toolkit, package])
    assert found == Cublas(f"{toolkit}/include", f"{toolkit}/lib64", "libcublas.so")

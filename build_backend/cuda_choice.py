"""Decides whether CUDA kernels are compiled, and says why not: the build records the answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Toolkit(NamedTuple):
    """A CUDA toolkit: its root folder and its version ("13.0")."""

    home: str
    version: str


class CudaChoice(NamedTuple):
    """Whether CUDA is compiled, the reason as one clause, and the toolkit where it is."""

    compiled: bool
    reason: str
    toolkit: Toolkit | None = None


def find_toolkit(env: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The toolkit of the first nvcc found: CUDA_HOME's, PATH's, then the customary folder's."""
    homes = (env.get("CUDA_HOME"), env.get("CUDA_PATH"), "/usr/local/cuda")
    named = [os.path.join(home, "bin", "nvcc") if home else None for home in homes]
    for nvcc in (*named[:2], shutil.which("nvcc", path=env.get("PATH")), named[2]):
        if nvcc and os.access(nvcc, os.X_OK):
            # The folder above nvcc is not always the toolkit's root: nvcc on PATH may be a wrapper
            # script. nvcc itself knows.
            dryrun = ("--dryrun", "-c", "-x", "cu", os.devnull)
            top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, *dryrun), re.MULTILINE)
            release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
            if top and release:
                return Toolkit(os.path.realpath(top[1].strip()), release[1])
    return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def choose(
    torch_cuda: str | None,
    has_kernels: bool,
    request: str | None = None,
    toolkit: Toolkit | None = None,
) -> CudaChoice:
    """Decides from facts alone, never from whether a GPU is in this machine.

    Args:
        torch_cuda: `torch.version.cuda`, None for a torch without CUDA.
        has_kernels: whether sources.json lists a CUDA module.
        request: the environment variable DGL_EXT_CUDA: "0" forbids, "1" demands, None leaves open.
        toolkit: the toolkit found, if any.

    Raises:
        RuntimeError: CUDA is demanded and cannot be compiled, or the request is not understood.
    """
    if request not in (None, "", "0", "1"):
        raise RuntimeError(f"DGL_EXT_CUDA must be 0 or 1, got {request!r}")
    if request == "0":
        return CudaChoice(False, "DGL_EXT_CUDA=0 was set")
    if not has_kernels:
        why_not = "this version of dgl_ext has no CUDA kernels yet"
    elif torch_cuda is None:
        why_not = "the torch that it was built against has no CUDA"
    elif toolkit is None:
        why_not = f"torch was built for CUDA {torch_cuda}, but no nvcc was found"
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        why_not = f"torch was built for CUDA {torch_cuda}, but nvcc is of CUDA {toolkit.version}"
    else:
        return CudaChoice(True, f"torch and nvcc are of CUDA {toolkit.version}", toolkit)
    if request == "1":
        raise RuntimeError(f"DGL_EXT_CUDA=1 was set, but {why_not}")
    return CudaChoice(False, why_not)


class Cublas(NamedTuple):
    """Where cuBLAS is: the folders of its header and of its library, and the library's name."""

    include: str
    folder: str
    library: str


def find_cublas(roots: Iterable[Path]) -> Cublas:
    """Finds cuBLAS in the first of `roots` that has it: a toolkit, or torch's nvidia packages.

    A toolkit without cuBLAS is enough to compile the kernels: torch brings the library that it
    uses itself, and the extension is linked to that one by its versioned name.
    """
    searched = [root for root in roots if root.is_dir()]
    headers = [f for root in searched for f in sorted(root.glob("include/cublas_v2.h"))]
    libraries = [
        f
        for root in searched
        for pattern in ("lib64/libcublas.so*", "lib/libcublas.so*")
        for f in sorted(root.glob(pattern))
    ]
    if not headers or not libraries:
        where = ", ".join(map(str, searched)) or "no folder"
        raise RuntimeError(f"cublas_v2.h and libcublas.so were not found in {where}")
    return Cublas(str(headers[0].parent), str(libraries[0].parent), libraries[0].name)

"""Builds the extension modules that csrc/sources.json lists; the rest is in pyproject.toml."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as plain_build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_choice import CudaChoice, choose, find_cublas, find_toolkit  # noqa: E402
from dgl_ext_backend import MINIMUM_TORCH  # noqa: E402

SPEC = json.loads((ROOT / "csrc" / "sources.json").read_text())

# Whatever stands against compiling is said when something is compiled: metadata and sdists are made
# without torch.
PROBLEM = None
NEEDED = f"install torch >= {'.'.join(map(str, MINIMUM_TORCH))} first, then dgl_ext"
CUDA = CudaChoice(False, "torch is missing")
try:
    import torch

    TORCH = torch.__version__
    if tuple(map(int, TORCH.split(".")[:2])) < MINIMUM_TORCH:
        PROBLEM = f"torch {TORCH} is too old: {NEEDED}"
    CUDA = choose(
        torch.version.cuda,
        has_kernels=any(module.get("cuda") for module in SPEC["modules"].values()),
        request=os.environ.get("DGL_EXT_CUDA"),
        toolkit=find_toolkit() if torch.version.cuda else None,
    )
except ImportError as error:
    PROBLEM = f"torch cannot be imported ({error}): {NEEDED}"
except RuntimeError as error:
    PROBLEM = str(error)
if CUDA.toolkit:
    # torch guesses CUDA_HOME from the folder of the nvcc on PATH; it reads this at import.
    os.environ["CUDA_HOME"] = CUDA.toolkit.home

if PROBLEM is None:
    from torch.utils import cpp_extension

    base_build_ext = cpp_extension.BuildExtension
else:
    base_build_ext = plain_build_ext


class BuildExt(base_build_ext):
    """torch's compile command, with this project's include and library folders."""

    def run(self):
        """Compiles the modules, then records how beside them."""
        if PROBLEM:
            raise SystemExit(f"dgl_ext cannot be built: {PROBLEM}")
        print(f"dgl_ext: compiling {', '.join(self.names())} against torch {TORCH}")
        print(f"dgl_ext: CUDA kernels: {'yes' if CUDA.compiled else 'no'}, {CUDA.reason}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ.setdefault("MAX_JOBS", str(cores))
        super().run()
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        (folder / "_build_info.json").write_text(json.dumps(self.info(), indent=2) + "\n")

    def build_extensions(self):
        """Adds what depends on torch; drops the RPATH of the machine's Python."""
        for extension in self.extensions:
            device = "cuda" if SPEC["modules"][extension.name.split(".")[-1]].get("cuda") else "cpu"
            # -isystem: warnings are wanted for this project's code, not for torch's.
            for path in cpp_extension.include_paths(device):
                for flags in extension.extra_compile_args.values():
                    flags += ["-isystem", path]
            extension.library_dirs += cpp_extension.library_paths(device)
            if device == "cuda":
                packages = Path(torch.__file__).parents[1] / "nvidia"
                cublas = find_cublas([Path(CUDA.toolkit.home), *sorted(packages.glob("*"))])
                # After the toolkit's own headers: those of a package may lack what nvcc brings.
                extension.extra_compile_args["cxx"] += ["-idirafter", cublas.include]
                extension.library_dirs.append(cublas.folder)
                extension.extra_link_args.append(f"-l:{cublas.library}")
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None) or []
            kept = [word for word in command if not word.startswith("-Wl,-rpath")]
            setattr(self.compiler, name, kept)
        super().build_extensions()

    def names(self):
        """Names of the modules, without the package."""
        return [extension.name.split(".")[-1] for extension in self.extensions]

    def info(self):
        """What `python -m dgl_ext` tells of this build."""
        return {
            "modules": self.names(),
            "torch": TORCH,
            "python": platform.python_version(),
            "cxx_flags": SPEC["cxx_flags"],
            "cuda": {
                "compiled": CUDA.compiled,
                "reason": CUDA.reason,
                "arch_list": BUILT_FOR if CUDA.compiled else None,
            },
        }


class BuildPy(build_py):
    """setuptools' command, on an empty folder."""

    def run(self):
        """Copies the Python files; a file deleted since the last build must not be in the wheel."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def gencode(architectures: dict[str, list[str]]) -> list[str]:
    """nvcc's flags for code from the PTX of an architecture, and for the last PTX itself.

    nvcc's front end, more than half of the build's time, runs once for each PTX.
    """
    pairs = [(ptx, f"sm_{name}") for ptx, names in architectures.items() for name in names]
    last = list(architectures)[-1]
    return [f"-gencode=arch=compute_{p},code={c}" for p, c in (*pairs, (last, f"compute_{last}"))]


ARCH_LIST = os.environ.get("TORCH_CUDA_ARCH_LIST")
GENCODE = gencode(SPEC["modules"]["_C_cuda"]["architectures"])
BUILT_FOR = ARCH_LIST or " ".join(flag.rsplit("=", 1)[1] for flag in GENCODE)


def extension(name: str, module: dict) -> Extension:
    """One module of sources.json, without what only torch knows."""
    flags = {"cxx": list(SPEC["cxx_flags"])}
    if module.get("cuda"):
        flags["nvcc"] = list(module["nvcc_flags"])
        if not ARCH_LIST:  # else torch turns it into flags
            flags["nvcc"] += GENCODE
    return Extension(
        f"dgl_ext.{name}",
        sources=module["sources"],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*h"))],
        # Absolute, since ninja compiles in another folder.
        include_dirs=[str(ROOT / folder) for folder in SPEC["include_dirs"]],
        define_macros=[tuple(define.split("=")) for define in SPEC["defines"]],
        libraries=module["libraries"],
        extra_compile_args=flags,
        language="c++",
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension(name, module)
        for name, module in SPEC["modules"].items()
        if CUDA.compiled or not module.get("cuda")
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

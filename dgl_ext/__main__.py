"""`python -m dgl_ext`: what was built, and what this machine can run of it."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import dgl_ext
from dgl_ext._ops import extension


def build_info() -> dict[str, Any] | None:
    """What the build recorded of itself; None where nothing was built."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else None


def environment() -> dict[str, Any]:
    """Everything that the report says, as plain values."""
    gpus = range(torch.cuda.device_count())
    return {
        "dgl_ext": dgl_ext.__version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": build_info(),
        "extension_loaded": extension.available(),
        "extension_error": str(extension.error() or "") or None,
        "cuda_extension_loaded": extension.available("cuda"),
        "cuda_extension_error": str(extension.error("cuda") or "") or None,
        "backends": [
            "reference",
            *(["fused"] if extension.available() else []),
            *(["library"] if extension.available("cuda") else []),
        ],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }


def report(env: dict[str, Any]) -> str:
    """The environment as lines for a person."""
    build, cuda_version = env["build"], env["torch_cuda"]
    built_for = f"built for CUDA {cuda_version}" if cuda_version else "built without CUDA"
    cuda_part = "loaded"
    if not env["cuda_extension_loaded"]:
        cuda_part = f"not loaded: {env['cuda_extension_error'].splitlines()[0]}"
    lines = [
        ("dgl_ext", f"{env['dgl_ext']} in {env['location']}"),
        ("Python", f"{env['python']} on {env['platform']}"),
        ("torch", f"{env['torch']}, {built_for}"),
        ("CPU", f"{env['cpu_capability']}, {env['threads']} threads"),
        ("GPUs", ", ".join(env["gpus"]) or "none visible"),
    ]
    if build is None:
        why = "this is a source tree (run it elsewhere to see what is installed), or a failed build"
        lines.append(("built", f"nothing: {why}"))
    else:
        cuda = build["cuda"]
        kernels = f"for {cuda['arch_list']}" if cuda["compiled"] else f"none: {cuda['reason']}"
        lines += [
            ("built", f"{', '.join(build['modules'])} with torch {build['torch']}"),
            ("flags", " ".join(build["cxx_flags"])),
            ("CUDA kernels", kernels),
        ]
    lines += [
        ("C++ extension", "loaded" if env["extension_loaded"] else f"NO: {env['extension_error']}"),
        ("CUDA part", cuda_part),
        ("backends", ", ".join(env["backends"])),
    ]
    return "\n".join(f"{name + ':':<15}{text}" for name, text in lines)


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(prog="python -m dgl_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    env = environment()
    print(json.dumps(env, indent=2) if arguments.json else report(env))


if __name__ == "__main__":
    main()

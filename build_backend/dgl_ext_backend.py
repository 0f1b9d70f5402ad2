"""PEP 517 backend: setuptools, building against the torch that is already installed.

Build isolation hides the installed torch, and would fetch gigabytes of whichever is newest only to
compile against the wrong one. This backend finds the torch of the Python that the package is
installed into and puts it at the END of `sys.path`, so that the isolated setuptools still wins.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

from setuptools import build_meta

MINIMUM_TORCH = (2, 10)
PROBE = """
import json, sys, importlib.metadata as metadata
torch = [d.version for d in metadata.distributions(name="torch")][:1]
print(json.dumps({"python": list(sys.version_info[:2]), "path": sys.path, "torch": torch}))
"""

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist


def _recent_enough(versions: list[str]) -> bool:
    return any(tuple(map(int, v.split(".")[:2])) >= MINIMUM_TORCH for v in versions[:1])


def _candidates() -> list[str]:
    """The Pythons that the package may be for, the likeliest first."""
    # pip runs this file with the target's own Python, and hides its packages with PYTHONPATH and
    # PYTHONNOUSERSITE. `python -m build` and uv run another one: there the target is the active
    # environment's, which uv shows only on PATH, behind the build's own folder.
    own = os.path.dirname(sys.executable)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if folder != own)
    active = os.path.join(os.environ.get("VIRTUAL_ENV", ""), "bin", "python")
    return [sys.executable, active, shutil.which("python", path=path) or ""]


def _expose_torch() -> bool:
    """Makes a recent enough torch importable here; False where the target has none."""
    if _recent_enough([d.version for d in importlib.metadata.distributions(name="torch")]):
        return True
    hiding = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hiding}
    for python in filter(os.path.exists, _candidates()):
        probe = subprocess.run([python, "-c", PROBE], env=env, capture_output=True, text=True)
        found = json.loads(probe.stdout) if probe.returncode == 0 else {"python": None}
        if found["python"] == list(sys.version_info[:2]) and _recent_enough(found["torch"]):
            sys.path += [p for p in found["path"] if p and p not in sys.path]
            print(f"dgl_ext: building against torch {found['torch'][0]} of {python}")
            return True
    return False


def get_requires_for_build_wheel(config_settings=None):
    return [] if _expose_torch() else ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel

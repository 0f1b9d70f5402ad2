"""A copy of the sources with few kernels in it, where defects are planted and looked for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from emulator.planted import Bug

ROOT = Path(__file__).resolve().parents[2]

FEW_CONFIGS = """
    ConfigList<Config<float, Tile::kFloat32Small, false>, Config<float, Tile::kFloat32Small, true>,
               Config<float, Tile::kFloat32Medium, true>, Config<bf16, Tile::kHalfSmall, false>,
               Config<bf16, Tile::kHalfSmall, true>>;
"""
FEW_ELEMENT_CONFIGS = """
    ConfigList<Config<float, Tile::kFloat32Small, false>, Config<bf16, Tile::kHalfSmall, false>>;
"""


class Workshop:
    """A copy of the sources, with few kernels in it, and its build folder."""

    def __init__(self, folder: Path):
        self.sources, self.build = folder / "csrc", folder / "build"
        shutil.copytree(ROOT / "csrc", self.sources)
        instances = self.sources / "cuda" / "kernels" / "instances.cuh"
        text = instances.read_text()
        for name, few in (("Configs", FEW_CONFIGS), ("ElementConfigs", FEW_ELEMENT_CONFIGS)):
            text, count = re.subn(rf"(?<=using {name} =).*?;", few, text, count=1, flags=re.S)
            assert count == 1, name
        instances.write_text(text)
        self._call(
            "cmake", "-S", str(ROOT / "tests" / "emulator"), "-B", str(self.build),
            f"-DDGL_EXT_CSRC={self.sources}", "-DDGL_EXT_PLANTED=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        )  # fmt: skip

    def _call(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def failures(self, bug: Bug | None) -> str:
        """Builds with `bug` planted and runs the small suite; returns its report as JSON."""
        path = self.sources / bug.file if bug else None
        sound = path.read_text() if path else ""
        if bug and bug.text not in sound:
            raise LookupError(
                f"{bug.file} no longer contains what '{bug.name}' replaces: {bug.text!r}"
            )
        try:
            if path:
                path.write_text(sound.replace(bug.text, bug.instead, 1))
            self._call("cmake", "--build", str(self.build), "-j", "1")
            return self._call(sys.executable, "-m", "emulator.smoke", str(self.build))
        finally:
            if path:
                path.write_text(sound)

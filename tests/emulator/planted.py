"""Defects to plant, one at a time, in a copy of the sources: the kernels carry no test code.

Each is a text of one file, what to put in its place, and a pattern that one of the reports must
match. A text that no longer occurs is an error, so the list cannot rot silently.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    text: str
    instead: str
    report: str


TILE, LOADER, PHASES = "cuda/gemm_tile.cuh", "cuda/tile_loader.cuh", "cuda/phases.cuh"
FORWARD, BACKWARD = "cuda/linear_forward.cuh", "cuda/linear_backward.cuh"
GRADIENTS, FILM_GRADIENTS = "cuda/linear_gradients.cuh", "cuda/film_gradients.cuh"
LINEAR_STEP, FILM_STEP = "cuda/linear_step.cuh", "cuda/film_step.cuh"
LOSSES = "cuda/cross_entropy.cuh"
FILM_FORWARD, FILM_BACKWARD = "cuda/film_forward.cuh", "cuda/film_backward.cuh"
RACE = r"race on shared memory of block \d+|read of uninitialised shared memory"
WRONG = r"\d+ of \d+ elements wrong"
GRID_RACE = r"race on|read of uninitialised|elements wrong"

BUGS = [
    Bug(
        "no barrier in the main loop", TILE,
        "__syncthreads();  // stage `read` has landed", "// stage `read` has landed", RACE,
    ),
    Bug(
        "no barrier after the main loop", TILE,
        "    __syncthreads();  // every copy", "    // every copy", RACE,
    ),
    Bug(
        "no barrier in the epilogue", TILE,
        "      spill(out, first);\n      __syncthreads();", "      spill(out, first);", RACE,
    ),
    Bug(
        "no barrier after the epilogue", TILE,
        "kRun)));\n      }\n      __syncthreads();", "kRun)));\n      }", RACE,
    ),
    Bug(
        "no barrier in a column sum", PHASES,
        "  partial[threadIdx.x] = sum;\n  __syncthreads();", "  partial[threadIdx.x] = sum;",
        r"race on shared memory|elements wrong",
    ),
    Bug(
        "barrier inside a divergent branch", PHASES,
        "partial[threadIdx.x] = sum;\n", "partial[threadIdx.x] = sum;\n  if (column < columns)\n",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "early exit before a barrier", PHASES,
        "  double sum = 0;\n  if (column < columns) {",
        "  double sum = 0;\n  if (column >= columns) return;\n  if (column < columns) {",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "no cp.async wait", TILE,
        "      copy_async_wait<C::kStages - 2>();\n", "", WRONG + "|in flight",
    ),
    Bug("cp.async wait one group too lax", TILE, "<C::kStages - 2>", "<C::kStages - 1>",
        WRONG + "|in flight"),
    Bug(
        "one row too many, 16-byte copies", LOADER,
        "row + r < rows && bytes > 0", "row + r <= rows && bytes > 0",
        r"memory fault|out of bounds",
    ),
    Bug(
        "one row too few, 16-byte copies", LOADER,
        "row + r < rows && bytes > 0", "row + r + 1 < rows && bytes > 0", WRONG,
    ),
    Bug(
        "one column too many, 16-byte copies", LOADER,
        "inside = columns - column;", "inside = columns - column + 1;", WRONG + "|memory fault",
    ),
    Bug(
        "one column too many, element copies", LOADER,
        "r < rows && c < columns;", "r < rows && c <= columns;", WRONG + "|memory fault",
    ),
    Bug(
        "one row too many, 16-bit elements", LOADER,
        "r < rows && c < columns ?", "r <= rows && c < columns ?", WRONG + "|memory fault",
    ),
    Bug(
        "no zero fill, 16-byte copies", LOADER,
        "      copy_async<16>(", "      if (exists) copy_async<16>(", WRONG + "|uninitialised",
    ),
    Bug(
        "no zero fill, element copies", LOADER,
        "      copy_async<sizeof(T)>(", "      if (exists) copy_async<sizeof(T)>(",
        WRONG + "|uninitialised",
    ),
    Bug(
        "store one column too far", TILE,
        "if (e < count) to[e]", "if (e <= count) to[e]", r"stray write|memory fault|out of bounds",
    ),
    Bug(
        "store one row too far", TILE,
        "const int rows = int(smaller(m_end - m0, C::kRows));\n    const int columns",
        "const int rows = int(smaller(m_end - m0 + 1, C::kRows));\n    const int columns",
        r"stray write|memory fault|out of bounds",
    ),
    Bug(
        "no grid sync before the logits", FORWARD,
        "    grid_sync();\n    write_logits", "    write_logits", GRID_RACE,
    ),
    Bug(
        "no grid sync after the planes", BACKWARD,
        "      Gradients::copy_masked(args, all);\n      grid_sync();",
        "      Gradients::copy_masked(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding row splits", BACKWARD,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "no grid sync before the modulation", FILM_FORWARD,
        "    grid_sync();\n    modulate", "    modulate", GRID_RACE,
    ),
    Bug(
        "no grid sync after the modulation", FILM_FORWARD,
        "    modulate(args, all);\n    grid_sync();", "    modulate(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before the film logits", FILM_FORWARD,
        "    grid_sync();\n    write_logits", "    write_logits", GRID_RACE,
    ),
    Bug(
        "no grid sync after prepare", FILM_BACKWARD,
        "    Gradients::prepare_features(args, all);\n    grid_sync();",
        "    Gradients::prepare_features(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before combine", FILM_BACKWARD,
        "    grid_sync();\n    Gradients::combine", "    Gradients::combine", GRID_RACE,
    ),
    Bug(
        "no grid sync after combine", FILM_BACKWARD,
        "    Gradients::combine(args, all);\n    grid_sync();",
        "    Gradients::combine(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding film row splits", FILM_BACKWARD,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "a film row split is left out", FILM_GRADIENTS,
        "column), args.plan.row_splits, plane", "column), args.plan.row_splits - 1, plane", WRONG,
    ),
    Bug(
        "idle CTAs leave before the grid sync", FORWARD,
        "    if (args.plan.direct) return;\n    grid_sync();",
        "    if (args.plan.direct || blockIdx.x == 0) return;\n    grid_sync();",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "alignment not looked at", "planning.h",
        "(data) % 16 == 0 && stride * element_size(dtype) % 16 == 0;",
        "(data) + stride + element_size(dtype) > 0;", r"misaligned",
    ),
    Bug("wrong fragment of B", TILE, "l / 8 % 2 * kRowElements", "l / 16 * kRowElements", WRONG),
    Bug(
        "encoder leak applied to the head", GRADIENTS,
        "leak = p.leaks.head;", "leak = p.leaks.encoder;", WRONG,
    ),
    Bug(
        "a closed modulation", FILM_GRADIENTS,
        "narrow<T>(encoder * fused * y)", "narrow<T>(encoder * fused)", WRONG,
    ),
    Bug(
        "a closed leak is a product with 0", GRADIENTS,
        "if (leak != 0) {", "if (leak >= 0) {", r"grad_bias 0: 1 of 11 elements wrong.*got nan",
    ),
    Bug(
        "a branch without a gradient is a product with 0", FILM_GRADIENTS,
        "args.plan.need_branch[0] ? fused * y : 0", "fused * y",
        r"grad_film_weight: 72 of 6912 elements wrong.*got nan",
    ),
    Bug(
        "no barrier in the count of rows", LOSSES,
        "of_warp[threadIdx.x] = mine;\n    __syncthreads();", "of_warp[threadIdx.x] = mine;",
        RACE + "|" + WRONG,
    ),
    Bug(
        "no barrier before warps' losses are added", LOSSES,
        "of_warp[threadIdx.x] = {loss, hits};\n    __syncthreads();",
        "of_warp[threadIdx.x] = {loss, hits};", RACE + "|" + WRONG,
    ),
    Bug(
        "no grid sync before the rows of a step", LINEAR_STEP,
        "      grid_sync();\n      Losses::run_rows", "      Losses::run_rows", GRID_RACE,
    ),
    Bug(
        "no grid sync after the rows, nor between chunks", LINEAR_STEP,
        "      Gradients::copy_masked(args.backward, rows);\n      grid_sync();",
        "      Gradients::copy_masked(args.backward, rows);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding a step's sums", LINEAR_STEP,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's modulation", FILM_STEP,
        "      grid_sync();\n      Forward::modulate", "      Forward::modulate", GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's film logits", FILM_STEP,
        "      grid_sync();\n      Forward::template", "      Forward::template", GRID_RACE,
    ),
    Bug(
        "no grid sync before the rows of a film step", FILM_STEP,
        "      grid_sync();\n      Losses::run_rows", "      Losses::run_rows", GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's combine", FILM_STEP,
        "        grid_sync();\n        Gradients::combine", "        Gradients::combine", GRID_RACE,
    ),
    Bug(
        "no grid sync after a step's combine", FILM_STEP,
        "        grid_sync();\n        Gradients::run_film", "        Gradients::run_film",
        GRID_RACE,
    ),
    Bug(
        "the residual lacks the target", LOSSES,
        "(column == target ? at_target : rest)", "rest", WRONG,
    ),
    Bug(
        "smoothing takes the target's own share away", LOSSES,
        "at_target = 1 - smoothing + smoothing / double(step.classes)", "at_target = 1 - smoothing",
        WRONG,
    ),
    Bug(
        "the last of equal maxima is the prediction", LOSSES,
        "(c < target && !beats(at_target, v))", "(c > target && !beats(at_target, v))",
        r"correct: got",
    ),
    Bug(
        "absent rows count", LOSSES,
        "(k == 0 || !is_absent(step.present[k - 1], row))", "true", WRONG,
    ),
    Bug(
        "unmixed planes are weighted", LOSSES,
        "if (plan.mixed) weight = found;", "weight = found;", WRONG,
    ),
    Bug(
        "losses of earlier chunks are forgotten", LOSSES,
        "if (rows.begin > 0) {", "if (rows.begin < 0) {", WRONG,
    ),
    Bug(
        "sums of earlier chunks are forgotten", GRADIENTS,
        "if (kStep && rows.begin > 0) add_stored", "if (kStep && rows.begin < 0) add_stored", WRONG,
    ),
    Bug(
        "film sums of earlier chunks are forgotten", FILM_GRADIENTS,
        "if (kStep && rows.begin > 0) add_stored", "if (kStep && rows.begin < 0) add_stored", WRONG,
    ),
    Bug(
        "features of absent rows reach the weights", GRADIENTS,
        "to[row * pitch + column] = absent ?", "to[row * pitch + column] = false ?", WRONG,
    ),
    Bug(
        "absent rows get the leak's gradient", GRADIENTS,
        "v[e] = absent ? Accumulator(0) : v[e] * scale;", "v[e] *= scale;", WRONG,
    ),
    Bug(
        "an absent modality takes part in the fused logits", LINEAR_STEP,
        "k == 0 ? !is_absent(p.head.present[i], rows.begin + row) : k == i + 1",
        "k == 0 || k == i + 1", WRONG,
    ),
    Bug(
        "an absent y is read", FILM_FORWARD,
        "if (is_absent(head.present[1], row)) return 0;\n", "", WRONG,
    ),
    Bug(
        "every branch is scaled like the fused one", "plan.cpp",
        "const int branch = plan_.step.mixed ? 0 : i + 1;", "const int branch = 0;", WRONG,
    ),
]  # fmt: skip
BY_NAME = {bug.name: bug for bug in BUGS}
# The control, and one of each sort: what every run of the tests can afford.
SHORT_LIST = [
    "no barrier in the main loop",
    "no cp.async wait",
    "one row too many, 16-byte copies",
    "no grid sync before the logits",
    "no grid sync after the rows, nor between chunks",
]

FEW_CONFIGS = """
    ConfigList<Config<float, Tile::kFloat32Small, false>, Config<float, Tile::kFloat32Small, true>,
               Config<float, Tile::kFloat32Large, true>, Config<bf16, Tile::kHalfSmall, false>,
               Config<bf16, Tile::kHalfSmall, true>>;
"""


class Workshop:
    """A copy of the sources, with few kernels in it, and its build folder."""

    def __init__(self, folder: Path):
        self.sources, self.build = folder / "csrc", folder / "build"
        shutil.copytree(ROOT / "csrc", self.sources)
        instances = self.sources / "cuda" / "instances.cuh"
        text = re.sub(
            r"(?<=using FilmConfigs =).*?;", FEW_CONFIGS, instances.read_text(), flags=re.S
        )
        text = re.sub(
            r"using LinearConfigs = .*?;", "using LinearConfigs = FilmConfigs;", text, flags=re.S
        )
        instances.write_text(text)
        self._call(
            "cmake", "-S", str(ROOT / "tests" / "emulator"), "-B", str(self.build),
            f"-DDGL_EXT_CSRC={self.sources}", f"-DPython_EXECUTABLE={sys.executable}",
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

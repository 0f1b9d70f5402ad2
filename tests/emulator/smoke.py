"""A small suite in a process of its own: what a planted bug must not survive.

    python -m emulator.smoke FOLDER     (in tests/) prints the failures as JSON

Needs only the kernels that planted.py leaves in a build: float32 small and large, bfloat16 small.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from emulator import harness
from emulator.film import FilmCase, FilmProblem
from emulator.harness import Layout, Poison, Schedule
from emulator.linear import LinearCase, LinearProblem


def cases():
    """(problem class, case, with the race detector)"""
    odd = Layout(aligned=False, gap=1)
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25}
    busy = Schedule(seed=7, policy="random", multiprocessors=6)
    float32 = {"tile": "float32_small", "dtype": "float32"}
    large = {"tile": "float32_large", "dtype": "float32"}
    half = {"tile": "half_small", "dtype": "bfloat16"}
    for races in (False, True):
        for kind in (float32, half):
            yield LinearProblem, LinearCase(37, (70, 45), 11, layout=odd, **leaks, **kind), races
            yield LinearProblem, LinearCase(37, (72, 136), 43, splits=3, **leaks, **kind), races
            yield FilmProblem, FilmCase(37, 70, 45, 11, layout=odd, **leaks, **kind), races
            film = FilmCase(37, 72, 136, 43, splits=3, schedule=busy, **leaks, **kind)
            yield FilmProblem, film, races
        yield LinearProblem, LinearCase(37, (70, 45), 11, splits=2, schedule=busy, **large), races
        yield LinearProblem, LinearCase(130, (72, 48), 11, **large), races
    # NaN where nothing flows: through a closed leak, or from a branch without a gradient
    incoming = (Poison("incoming 1", 5, 3, math.nan),)
    yield LinearProblem, LinearCase(37, (72, 48), 11, poison=incoming, **float32), False
    target = (Poison("target", 5, 3, math.nan),)
    x_alone = {"arrives": (False, True, False), "head_leak": 0.25}
    yield FilmProblem, FilmCase(37, 72, 48, 11, poison=target, **x_alone, **float32), False


def run(folder: Path) -> list[str]:
    module = harness.load("emulated_kernels", folder)
    failures = []
    for problem, case, races in cases():
        for direction in ("run_forward", "run_backward"):
            try:
                getattr(problem(module, case), direction)(races)
            except (AssertionError, module.EmulatorError) as error:
                failures.append(f"{case} {direction}: {error}")
    return failures


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))

"""A small suite in a process of its own: what a planted bug must not survive.

    python -m emulator.smoke FOLDER     (in tests/) prints the failures as JSON

Needs only the kernels that planted.py leaves in a build: float32 small and medium, bfloat16 small.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from emulator import harness
from emulator.film import FilmCase, FilmProblem
from emulator.film_step import FilmStepCase, FilmStepProblem
from emulator.harness import Layout, Poison, Schedule
from emulator.linear import LinearCase, LinearProblem
from emulator.linear_step import EVEN, LinearStepCase, LinearStepProblem
from emulator.losses import LossCase


class Ties(LinearStepProblem):
    """Nothing but equal logits: the first class is the prediction."""

    def __init__(self, module, case):
        super().__init__(module, case)
        for feature in self.features:
            feature.elements[...] = 0


class Agreed(LinearStepProblem):
    """Every row's prediction is its soft target's likeliest class."""

    def __init__(self, module, case):
        super().__init__(module, case)
        self.biases[0].elements[0, 7] = 100
        self.losses.soft.elements[:, 7] = 1


class Pair(LinearStepProblem):
    """Two modalities of one width, the second before the first in memory: few launches."""

    def __init__(self, module, case):
        super().__init__(module, case)
        self.join_features(turned=True)

    def run_step(self, races=False):
        launches, _ = harness.counted(self.module, super(), "step")
        assert launches <= 6, f"{launches} launches for two equal widths"


def cases():
    """(problem class, case, with the race detector) of the logits' launches"""
    odd = Layout(aligned=False, gap=1)
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25}
    busy = Schedule(seed=7, policy="random", multiprocessors=6)
    float32 = {"tile": "float32_small", "dtype": "float32"}
    large = {"tile": "float32_medium", "dtype": "float32"}
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


def library_cases():
    """The same by the library executor: products of equal and of unequal widths, and none."""
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25, "executor": "library"}
    for races in (False, True):
        yield LinearProblem, LinearCase(37, (72, 72), 11, absent=(0.3, 0.0), **leaks), races
        yield LinearProblem, LinearCase(37, (70, 45, 0), 11, executor="library"), races
        gaps = {"layout": Layout(aligned=False, gap=1), "concat": False, "executor": "library"}
        yield LinearProblem, LinearCase(37, (48, 48, 48), 11, **gaps), races
        # Copies of masked features lie one behind the other, and so do the columns of the weight's
        # gradient: without the second ones, the others are at unequal distances.
        some = (True,) * 4 + (True, False, True, True) + (True,)
        four = LinearCase(37, (48,) * 4, 11, absent=(0.3,) * 4, wanted=some, executor="library")
        yield LinearProblem, four, races
        yield LinearProblem, LinearCase(0, (72, 48), 11, executor="library"), races
        yield FilmProblem, FilmCase(37, 72, 48, 11, absent=(0.3, 0.4), **leaks), races


def library_step_cases():
    half = {"tile": "half_small", "dtype": "bfloat16"}
    uneven = LossCase(alpha=(0.5, -2.0, 1.5, 0.25), ignored=0.2, label_smoothing=0.1)
    chunked = LossCase(ignored=0.2, limit=1)
    absent, leaks = {"absent": (0.3, 0.4)}, {"encoder_leak": 0.5, "head_leak": 0.25}
    library = {"executor": "library"}
    for races in (False, True):
        yield LinearStepProblem, LinearStepCase(70, (48, 48), 11, loss=uneven, **library), races
        case = LinearStepCase(70, (72, 48), 11, loss=chunked, **library, **leaks, **absent, **half)
        yield LinearStepProblem, case, races
        case = FilmStepCase(70, 72, 48, 11, loss=chunked, **library, **leaks, **absent, **half)
        yield FilmStepProblem, case, races
        yield FilmStepProblem, FilmStepCase(70, 72, 48, 11, loss=uneven, **library), races
    for concat in (True, False):
        pair = LinearStepCase(37, (72, 72), 11, concat=concat, loss=EVEN, **library)
        yield Pair, pair, False
    # more classes than a row has room for, and more than one warp holds
    yield LinearStepProblem, LinearStepCase(3, (16, 8), 2500, **library), False
    yield LinearStepProblem, LinearStepCase(5, (16, 8), 300, **library), True


def step_cases():
    """The same of the training steps."""
    leaks = {"encoder_leak": 0.5, "head_leak": 0.25}
    busy = Schedule(seed=7, policy="random", multiprocessors=6)
    half = {"tile": "half_small", "dtype": "bfloat16"}
    loss = LossCase(alpha=(0.5, -2.0, 1.5, 0.25), ignored=0.2, label_smoothing=0.1)
    chunked = LossCase(ignored=0.2, limit=1)
    for races in (False, True):
        absent = {"absent": (0.3, 0.4)}
        yield LinearStepProblem, LinearStepCase(70, (24, 16, 8, 40), 11, loss=loss, **absent), races
        yield LinearStepProblem, LinearStepCase(70, (72, 48), 11, loss=loss, **leaks), races
        # more split planes than one lane reads
        yield LinearStepProblem, LinearStepCase(40, (160, 136), 6, splits=5, loss=loss), races
        open_leaks = LinearStepCase(
            70, (72, 48), 11, loss=chunked, schedule=busy, **leaks, **absent
        )
        yield LinearStepProblem, open_leaks, races
        yield LinearStepProblem, LinearStepCase(70, (72, 48), 11, loss=chunked, **half), races
        yield FilmStepProblem, FilmStepCase(70, 72, 48, 11, loss=loss, **absent), races
        film = FilmStepCase(70, 72, 48, 11, loss=chunked, schedule=busy, **leaks, **absent, **half)
        yield FilmStepProblem, film, races
        weighted = LossCase(
            ignored=0.2, label_smoothing=0.1, limit=1, class_weight=True, sample_weight=True
        )
        case = LinearStepCase(70, (72, 48), 11, loss=weighted, **leaks, **absent)
        yield LinearStepProblem, case, races
        sharp = LossCase(ignored=0.2, class_weight=True, sample_weight=True)
        yield FilmStepProblem, FilmStepCase(40, 24, 16, 11, loss=sharp, **half), races
        soft = LossCase(soft="float32", class_weight=True)
        yield LinearStepProblem, LinearStepCase(70, (8, 16), 130, loss=soft, **absent), races
    yield Agreed, LinearStepCase(9, (16,), 130, loss=LossCase(soft="float32")), False
    yield Ties, LinearStepCase(40, (16,), 5, bias=False), False


def run(folder: Path) -> list[str]:
    module = harness.load("emulated_kernels", folder)
    failures = []
    logits, steps = [*cases(), *library_cases()], [*step_cases(), *library_step_cases()]
    runs = [(*c, direction) for c in logits for direction in ("run_forward", "run_backward")]
    for problem, case, races, direction in runs + [(*c, "run_step") for c in steps]:
        try:
            getattr(problem(module, case), direction)(races)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{case} {direction}: {error}")
    return failures


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))

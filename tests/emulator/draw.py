"""Random problems: sizes, layouts, leaks, subsets and schedules that nobody would think of."""

from __future__ import annotations

import dataclasses

import numpy as np
from emulator.film import OUTPUTS, FilmCase
from emulator.film_step import FilmStepCase
from emulator.harness import Layout, Schedule
from emulator.linear import LinearCase
from emulator.linear_step import LinearStepCase
from emulator.losses import LossCase

# Every tile of every dtype; float32 tiles with operands that are not aligned run the one exact,
# unaligned kernel, whatever was asked for.
TILES = [
    ("float64", "float64"),
    ("float32_small", "float32"),
    ("float32_medium", "float32"),
    ("tf32_small", "float32"),
    ("tf32_medium", "float32"),
    ("half_small", "bfloat16"),
    ("half_medium", "bfloat16"),
    ("half_small", "float16"),
    ("half_medium", "float16"),
]


class Draw:
    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.seed = seed

    def below(self, n: int) -> int:
        return int(self.random.integers(n))

    def size(self, largest: int) -> int:
        """Mostly small, now and then 1 or the largest."""
        draw = self.below(8)
        return 1 if draw == 0 else largest if draw == 1 else 1 + self.below(largest)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def leak(self) -> float:
        return [0.0, 0.0, 0.3, 1.0][self.below(4)]

    def layout(self) -> Layout:
        return Layout(self.chance(65), self.below(2) * self.below(20), self.chance(50))

    def absent(self, modalities: int) -> tuple[float, ...]:
        return tuple([0, 0, 0.3, 1.0][self.below(4)] for _ in range(modalities))

    def loss(self) -> LossCase:
        return LossCase(
            alpha=[(1.0, 0.5), (0.0, 2.0), (-1.5, 0.25)][self.below(3)],
            mean=self.chance(70),
            label_smoothing=[0.0, 0.0, 0.1, 1.0][self.below(4)],
            ignored=[0.0, 0.2, 0.5, 1.0][self.below(4)],
            limit=[1 << 26, 1 << 26, 1, 1 << 14][self.below(4)],
            class_weight=self.chance(25),
            sample_weight=self.chance(25),
            soft=["", "", "float64", "float32", "bfloat16", "float16"][self.below(6)],
        )

    def schedule(self) -> Schedule:
        return Schedule(
            seed=self.below(1 << 30),
            policy=["linear", "reverse", "random", "priorities"][self.below(4)],
            delivery=["late", "late", "early", "random"][self.below(4)],
            multiprocessors=1 + self.below(6),
        )


def linear_case(seed: int, tile: str, dtype: str) -> LinearCase:
    draw = Draw(seed)
    count = [1, 2, 2, 2, 3, 8][draw.below(6)]
    layout = draw.layout()
    concat = draw.chance(50)
    widths = tuple(draw.size(150 // count + 20) for _ in range(count))
    if concat and layout.aligned:  # slices are aligned only where the widths before them are
        widths = tuple(-(-w // 8) * 8 for w in widths)
    everything = 2 * count + 1
    return LinearCase(
        rows=draw.size(200 if draw.chance(25) else 70),
        widths=widths,
        classes=draw.size(300 if draw.chance(25) else 40),
        dtype=dtype,
        tile=tile,
        concat=concat,
        bias=draw.chance(80),
        layout=layout,
        gradient_layout=draw.layout() if draw.chance(40) else None,
        splits=[0, 0, 1, 2, 5][draw.below(5)],
        encoder_leak=draw.leak(),
        head_leak=draw.leak(),
        arrives=tuple(draw.chance(80) for _ in range(count + 1)),
        wanted=tuple(draw.chance(85) for _ in range(everything)),
        schedule=draw.schedule(),
        absent=draw.absent(count) if draw.chance(30) else (),
    )


def linear_step_case(seed: int, tile: str, dtype: str) -> LinearStepCase:
    case, draw = linear_case(seed, tile, dtype), Draw(seed + 1)
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    fields |= {"absent": draw.absent(len(case.widths)), "loss": draw.loss(), "arrives": ()}
    return LinearStepCase(**fields)


def film_case(seed: int, tile: str, dtype: str) -> FilmCase:
    draw = Draw(seed)
    return FilmCase(
        rows=draw.size(200 if draw.chance(20) else 60),
        condition_width=draw.size(120),
        hidden=draw.size(90),
        classes=draw.size(200 if draw.chance(20) else 40),
        dtype=dtype,
        tile=tile,
        bias=draw.chance(80),
        layout=draw.layout(),
        gradient_layout=draw.layout() if draw.chance(40) else None,
        splits=[0, 0, 1, 2, 5][draw.below(5)],
        encoder_leak=draw.leak(),
        head_leak=draw.leak(),
        arrives=tuple(draw.chance(80) for _ in range(3)),
        wanted=tuple(name for name in OUTPUTS if draw.chance(85)),
        schedule=draw.schedule(),
        absent=draw.absent(2) if draw.chance(30) else (),
    )


def film_step_case(seed: int, tile: str, dtype: str) -> FilmStepCase:
    case, draw = film_case(seed, tile, dtype), Draw(seed + 1)
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    fields |= {"absent": draw.absent(2), "loss": draw.loss(), "arrives": (True,) * 3}
    return FilmStepCase(**fields)

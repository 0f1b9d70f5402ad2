"""The FiLM head: problems, and what their launches must return (as in csrc/common/problem.h)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from emulator.bounded import Bounded, add, concatenate, matmul
from emulator.harness import (
    Layout,
    Memory,
    Poison,
    Schedule,
    absent_rows,
    check,
    check_untouched,
    launch,
    uses_tf32,
)

OUTPUTS = ("condition", "target", "film_weight", "out_weight", "film_bias", "out_bias")


@dataclass(frozen=True)
class FilmCase:
    rows: int = 37
    condition_width: int = 70
    hidden: int = 45
    classes: int = 11
    dtype: str = "float32"
    tile: str = "float32_small"
    executor: str = "fused"
    bias: bool = True
    layout: Layout = field(default_factory=Layout)
    gradient_layout: Layout | None = None
    splits: int = 0
    encoder_leak: float = 0.0
    head_leak: float = 0.0
    arrives: tuple[bool, bool, bool] = (True, True, True)  # g, g_x, g_y
    wanted: tuple[str, ...] = OUTPUTS
    schedule: Schedule = field(default_factory=Schedule)
    poison: tuple[Poison, ...] = ()  # of inputs, by their names in Memory
    absent: tuple[float, ...] = ()  # of x and y, the share of rows without it; 0: no mask

    def __str__(self):
        return (
            f"{self.tile}-{self.dtype}-{self.rows}x{self.condition_width}x{self.hidden}"
            f"x{self.classes}-{'aligned' if self.layout.aligned else 'odd'}-{self.schedule.seed}"
        )


class FilmProblem:
    """A case in memory."""

    def __init__(self, module, case: FilmCase):
        self.module, self.case = module, case
        self.precision = module.Precision(
            getattr(module.Dtype, case.dtype), allow_tf32=case.tile.startswith("tf32")
        )
        self.request = module.PlanRequest(
            executor=getattr(module.Executor, case.executor),
            tile=getattr(module.Tile, case.tile),
            splits=case.splits,
        )
        seed = case.rows + case.hidden
        self.memory = memory = Memory(module, case.layout, case.dtype, seed, case.poison)
        self.x = memory.input("condition", (case.rows, case.condition_width))
        self.y = memory.input("target", (case.rows, case.hidden))
        self.masks = memory.masks(case.absent, [self.x, self.y])
        self.absent = [absent_rows(mask, case.rows) for mask in self.masks]
        self.film_weight = memory.input(
            "film_weight", (2 * case.hidden, case.condition_width), case.condition_width**-0.5
        )
        self.out_weight = memory.input("out_weight", (case.classes, case.hidden), case.hidden**-0.5)
        self.problem = {
            "rows": case.rows,
            "condition_width": case.condition_width,
            "hidden": case.hidden,
            "classes": case.classes,
            "condition": self.x.pair,
            "target": self.y.pair,
            "film_weight": self.film_weight.pair,
            "out_weight": self.out_weight.pair,
            "present": [None if m is None else m.buffer.address for m in self.masks],
        }
        accumulator = memory.bounded(self.x).accumulator
        self.film_bias = Bounded(np.zeros(2 * case.hidden), 0, accumulator)
        self.out_bias = Bounded(np.zeros(case.classes), 0, accumulator)
        if case.bias:
            film_bias = memory.input("film_bias", (1, 2 * case.hidden))
            out_bias = memory.input("out_bias", (1, case.classes))
            self.problem["film_bias"] = film_bias.buffer.address
            self.problem["out_bias"] = out_bias.buffer.address
            self.film_bias = memory.bounded(film_bias)[0]
            self.out_bias = memory.bounded(out_bias)[0]
        self.accumulator = accumulator

    def _inputs(self) -> tuple[Bounded, Bounded]:
        """x and y as they count: zero where they are absent."""
        both = zip((self.x, self.y), self.absent, strict=True)
        x, y = (self.memory.bounded(t).without_rows(absent) for t, absent in both)
        return x, y

    def _halves(self, both: Bounded) -> tuple[Bounded, Bounded]:
        hidden = self.case.hidden
        return both[..., :hidden], both[..., hidden:]

    def _zeros(self, like: Bounded) -> Bounded:
        """Where nothing flows: not 0 times something, which may be NaN."""
        return Bounded(np.zeros_like(like.value), 0, self.accumulator)

    def _alone(self, y: Bounded) -> Bounded:
        """The features of the target branch: y under the modulation of a zero condition."""
        bias_gamma, bias_beta = self._halves(self.film_bias)
        return bias_gamma * y + bias_beta

    def run_forward(self, races=False):
        case, memory = self.case, self.memory
        shape = (case.rows, case.classes)
        outs = [memory.place(n, shape) for n in ("fused", "x alone", "y alone")]
        modulation = memory.place(
            "modulation", (case.rows, 2 * case.hidden), dtype=self.accumulator
        )
        problem = self.problem | {
            "fused": outs[0].pair,
            "unimodal": [t.pair for t in outs[1:]],
            "modulation": modulation.pair,
        }
        plan = launch(
            self.module, "film_head_forward", problem, self.precision, case.schedule,
            self.request, races,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)
        both, logits = self._logits()
        check(modulation, both)
        for out, z in zip(outs, logits, strict=True):
            check(out, z.rounded(case.dtype))
        memory.check_surroundings()
        return plan, [*outs, modulation]

    def _logits(self) -> tuple[Bounded, list[Bounded]]:
        """The modulation and the three sets of logits before they are stored."""
        x, y = self._inputs()
        both = matmul(x, self.memory.bounded(self.film_weight).T, self.tf32) + self.film_bias
        gamma, beta = self._halves(both)
        weight = self.memory.bounded(self.out_weight).T
        hidden = [h.rounded(self.case.dtype) for h in (gamma * y + beta, beta, self._alone(y))]
        return both, [matmul(h, weight, self.tf32) + self.out_bias for h in hidden]

    def run_backward(self, races=False):
        case, memory = self.case, self.memory
        modulation = memory.place(
            "modulation",
            (case.rows, 2 * case.hidden),
            memory.random.standard_normal((case.rows, 2 * case.hidden)),
            dtype=self.accumulator,
        )
        incoming = [
            memory.input(f"incoming {k}", (case.rows, case.classes), layout=case.gradient_layout)
            if here
            else None
            for k, here in enumerate(case.arrives)
        ]
        outs = self._outputs(case.dtype)
        pairs = [t.pair if t else None for t in incoming]
        problem = self.problem | {
            "encoder_leak": case.encoder_leak,
            "head_leak": case.head_leak,
            "modulation": modulation.pair,
            "grad_fused": pairs[0],
            "grad_unimodal": pairs[1:],
        }
        for name in self._reached():
            out = outs[name]
            problem["grad_" + name] = out.buffer.address if "bias" in name else out.pair
        memory.check_poison()
        plan = launch(
            self.module, "film_head_backward", problem, self.precision, case.schedule,
            self.request, races,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)
        expected = self._gradients(
            self._halves(memory.bounded(modulation)),
            [memory.bounded(t) if t else None for t in incoming],
        )
        for name, out in outs.items():
            if name in case.wanted and expected[name] is not None:
                check(out, expected[name].rounded(case.dtype))
            else:
                check_untouched(out)
        memory.check_surroundings()
        return plan, list(outs.values())

    def _reached(self) -> list[str]:
        """What is wanted and reached by some gradient; nobody may ask for more."""
        fused, of_x, of_y = self.case.arrives
        to_features, to_head = fused and self.case.encoder_leak, self.case.head_leak
        reached = {
            "condition": of_x or to_features,
            "target": of_y or to_features,
            "film_weight": fused or (of_x and to_head),
        }
        parameters = fused or ((of_x or of_y) and to_head)
        return [name for name in self.case.wanted if reached.get(name, parameters)]

    def _outputs(self, dtype: str):
        case = self.case
        shapes = {
            "condition": (case.rows, case.condition_width),
            "target": (case.rows, case.hidden),
            "film_weight": (2 * case.hidden, case.condition_width),
            "out_weight": (case.classes, case.hidden),
            "film_bias": (1, 2 * case.hidden),
            "out_bias": (1, case.classes),
        }
        return {
            name: self.memory.place("grad_" + name, shape, dtype=dtype)
            for name, shape in shapes.items()
        }

    def _gradients(self, modulation, g) -> dict[str, Bounded | None]:
        """What flows, before the final rounding; None where nothing does."""
        case, bounded, tf32 = self.case, self.memory.bounded, self.tf32
        encoder, head = case.encoder_leak, case.head_leak
        gamma, beta = modulation
        x, y = self._inputs()
        film_weight, out_weight = bounded(self.film_weight), bounded(self.out_weight)
        bias_gamma, _ = self._halves(self.film_bias)
        d = [None if t is None else matmul(t, out_weight, tf32) for t in g]
        leaked = [d[0]] + [None if t is None or head == 0 else t.scaled(head) for t in d[1:]]

        def stored(terms):
            total = add(terms)
            return None if total is None else total.rounded(case.dtype)

        # the gradient of [gamma|beta], as the condition sees it
        from_fused = None if d[0] is None or encoder == 0 else d[0].scaled(encoder)
        condition = None
        if from_fused is not None:
            seen = [stored([from_fused * y]), stored([from_fused, d[1]])]
            condition = matmul(concatenate(seen, 1), film_weight, tf32)
        elif d[1] is not None:
            condition = matmul(stored([d[1]]), film_weight[case.hidden :], tf32)

        target = add(
            [
                None if from_fused is None else from_fused * gamma,
                None if d[2] is None else d[2] * bias_gamma,
            ]
        )

        if condition is not None:
            condition = condition.without_rows(self.absent[0])
        if target is not None:
            target = target.without_rows(self.absent[1])
        halves = [stored([None if d[0] is None else d[0] * y]), stored(leaked[:2])]
        of_gamma, of_beta = (None if half is None else matmul(half.T, x, tf32) for half in halves)
        film_weight_grad = None
        if of_beta is not None:
            of_gamma = self._zeros(of_beta) if of_gamma is None else of_gamma
            film_weight_grad = concatenate([of_gamma, of_beta], 0)

        film_bias = None
        beta_terms = add(leaked)
        if beta_terms is not None:
            gamma_terms = add([leaked[0], leaked[2]])
            gamma_terms = self._zeros(y) if gamma_terms is None else gamma_terms * y
            film_bias = concatenate([gamma_terms.sum_rows(), beta_terms.sum_rows()], 0)

        features = [
            (gamma * y + beta).rounded(case.dtype),
            beta.scaled(head).rounded(case.dtype),
            self._alone(y).scaled(head).rounded(case.dtype),
        ]
        reaching = [k for k in range(3) if g[k] is not None and (k == 0 or head != 0)]
        out_weight_grad = add([matmul(g[k].T, features[k], tf32) for k in reaching])
        scaled = [g[k] if k == 0 else g[k].scaled(head) for k in reaching]
        return {
            "condition": condition,
            "target": target,
            "film_weight": film_weight_grad,
            "out_weight": out_weight_grad,
            "film_bias": film_bias,
            "out_bias": add(scaled).sum_rows() if scaled else None,
        }

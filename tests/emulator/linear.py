"""The linear head (concat, sum): problems, and what their launches must return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from emulator.bounded import Bounded, matmul
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


@dataclass(frozen=True)
class LinearCase:
    rows: int = 37
    widths: tuple[int, ...] = (70, 45)
    classes: int = 11
    dtype: str = "float32"
    tile: str = "float32_small"
    executor: str = "fused"
    concat: bool = True  # weights are column slices of one matrix, and the bias is shared
    bias: bool = True
    layout: Layout = field(default_factory=Layout)
    gradient_layout: Layout | None = None  # of the incoming gradients, where it differs
    splits: int = 0
    encoder_leak: float = 0.0
    head_leak: float = 0.0
    arrives: tuple[bool, ...] = ()  # which of (g, g_1, ..., g_M) come in; empty: all
    wanted: tuple[bool, ...] = ()  # (features..., weights..., bias); empty: all
    schedule: Schedule = field(default_factory=Schedule)
    poison: tuple[Poison, ...] = ()  # of inputs, by their names in Memory
    absent: tuple[float, ...] = ()  # of each modality, the share of rows without it; 0: no mask

    def __str__(self):
        return (
            f"{self.tile}-{self.dtype}-{self.rows}x{'+'.join(map(str, self.widths))}"
            f"x{self.classes}-{'concat' if self.concat else 'sum'}"
            f"-{'aligned' if self.layout.aligned else 'odd'}-{self.schedule.seed}"
        )


class LinearProblem:
    """A case in memory."""

    def __init__(self, module, case: LinearCase):
        self.module, self.case = module, case
        self.precision = module.Precision(
            getattr(module.Dtype, case.dtype), allow_tf32=case.tile.startswith("tf32")
        )
        self.request = module.PlanRequest(
            executor=getattr(module.Executor, case.executor),
            tile=getattr(module.Tile, case.tile),
            splits=case.splits,
        )
        seed = case.rows + case.classes
        self.memory = memory = Memory(module, case.layout, case.dtype, seed, case.poison)
        scale = 1 / np.sqrt(max(sum(case.widths), 1))
        self.features = [
            memory.input(f"feature {i}", (case.rows, w)) for i, w in enumerate(case.widths)
        ]
        self.masks = memory.masks(case.absent, self.features)
        self.absent = [absent_rows(mask, case.rows) for mask in self.masks]
        self.weights = self._matrices("weight", scale * 3)
        biases = 1 if case.concat else len(case.widths)
        self.biases = (
            [memory.input(f"bias {i}", (1, case.classes)) for i in range(biases)]
            if case.bias
            else []
        )
        self.common = {
            "rows": case.rows,
            "classes": case.classes,
            "width": list(case.widths),
            "feature": [t.pair for t in self.features],
            "weight": [t.pair for t in self.weights],
            "present": [None if m is None else m.buffer.address for m in self.masks],
        }

    def join_features(self, turned: bool = False) -> None:
        """Puts two features of one width into one buffer; turned: the second before the first."""
        case = self.case
        both = self.memory.input("both", (2 * case.rows, case.widths[0]), layout=Layout())
        for i in range(2):
            begin = (1 - i if turned else i) * case.rows
            self.features[i].elements[...] = both.elements[begin : begin + case.rows]
            address = both.pair[0] + begin * both.pair[1] * both.elements.itemsize
            self.common["feature"][i] = address, both.pair[1]

    def _feature(self, i: int) -> Bounded:
        """As it counts: zero where it is absent."""
        return self.memory.bounded(self.features[i]).without_rows(self.absent[i])

    def _matrices(self, name, scale=None, dtype=None):
        """(classes, width) matrices: slices of one for concat, each its own for sum."""
        case = self.case
        if not case.concat:
            shapes = [(case.classes, w) for w in case.widths]
            if scale is None:
                return [
                    self.memory.place(f"{name} {i}", s, dtype=dtype) for i, s in enumerate(shapes)
                ]
            return [self.memory.input(f"{name} {i}", s, scale) for i, s in enumerate(shapes)]
        shape = (case.classes, sum(case.widths))
        if scale is None:
            whole = self.memory.place(name, shape, dtype=dtype)
        else:
            whole = self.memory.input(name, shape, scale)
        return [Slice(whole, begin, width) for begin, width in self._spans()]

    def _spans(self):
        begin = 0
        for width in self.case.widths:
            yield begin, width
            begin += width

    def run_forward(self, races=False):
        case, memory = self.case, self.memory
        shape = (case.rows, case.classes)
        fused = memory.place("fused", shape)
        unimodal = [memory.place(f"unimodal {i}", shape) for i in range(len(case.widths))]
        addresses = [b.buffer.address for b in self.biases]
        problem = self.common | {"fused": fused.pair, "unimodal": [t.pair for t in unimodal]}
        if case.bias and case.concat:
            problem["fused_bias"] = addresses[0]
            problem["branch_bias"] = addresses * len(case.widths)
        elif case.bias:
            problem["branch_bias"] = addresses
        plan = launch(
            self.module, "linear_head_forward", problem, self.precision, case.schedule,
            self.request, races,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)
        bounded = memory.bounded
        partial = [
            matmul(self._feature(i), bounded(w).T, self.tf32) for i, w in enumerate(self.weights)
        ]
        biases = [bounded(b) for b in self.biases]
        branch = (biases * len(partial) if case.concat else biases) or [None] * len(partial)
        for out, s, b in zip(unimodal, partial, branch, strict=True):
            check(out, (s if b is None else s + b).rounded(case.dtype))
        total = partial[0]
        for term in partial[1:] + biases:
            total = total + term
        check(fused, total.rounded(case.dtype))
        memory.check_surroundings()
        return plan, [fused, *unimodal]

    def run_backward(self, races=False):
        case, memory = self.case, self.memory
        count = len(case.widths)
        arrives = case.arrives or (True,) * (count + 1)
        wanted = self._reached(case.wanted or (True,) * (2 * count + 1), arrives)
        incoming = [
            memory.input(f"incoming {k}", (case.rows, case.classes), layout=case.gradient_layout)
            if here
            else None
            for k, here in enumerate(arrives)
        ]
        grad_features = [
            memory.place(f"grad_feature {i}", (case.rows, w)) for i, w in enumerate(case.widths)
        ]
        grad_weights = self._matrices("grad_weight")
        grad_biases = [
            memory.place(f"grad_bias {i}", (1, case.classes))
            for i in range(1 if case.concat else count)
        ]
        pairs = [t.pair if t else None for t in incoming]
        addresses = [b.buffer.address for b in grad_biases]
        problem = self.common | {
            "encoder_leak": case.encoder_leak,
            "head_leak": case.head_leak,
            "grad_fused": pairs[0],
            "grad_unimodal": pairs[1:],
            "grad_feature": [
                t.pair if w else None for t, w in zip(grad_features, wanted[:count], strict=True)
            ],
            "grad_weight": [
                t.pair if w else None for t, w in zip(grad_weights, wanted[count:-1], strict=True)
            ],
        }
        if wanted[-1] and case.concat:
            problem["grad_fused_bias"] = addresses[0]
        elif wanted[-1]:
            reached = [arrives[0] or (own and case.head_leak) for own in arrives[1:]]
            problem["grad_branch_bias"] = [
                address if here else 0 for address, here in zip(addresses, reached, strict=True)
            ]
        memory.check_poison()
        plan = launch(
            self.module, "linear_head_backward", problem, self.precision, case.schedule,
            self.request, races,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)

        g = [memory.bounded(t) if t else None for t in incoming]
        for i in range(count):
            to_feature = self._mix(g[i + 1], g[0], case.encoder_leak)
            if to_feature is None or not wanted[i]:
                check_untouched(grad_features[i])
            else:
                weight = memory.bounded(self.weights[i])
                self._check_product(grad_features[i], to_feature, weight, self.absent[i])
            to_weight = self._mix(g[0], g[i + 1], case.head_leak)
            if to_weight is not None and wanted[count + i]:
                operand, scale = to_weight
                self._check_product(grad_weights[i], (operand.T, scale), self._feature(i))
            elif not case.concat:
                check_untouched(grad_weights[i])
        for i, out in enumerate(grad_biases):
            branches = g[1:] if case.concat else [g[i + 1]]
            terms = [g[0]] + [t.scaled(case.head_leak) for t in branches if t and case.head_leak]
            terms = [t for t in terms if t is not None]
            if not terms or not wanted[-1]:
                check_untouched(out)
                continue
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            check(out, total.sum_rows().rounded(case.dtype))
        memory.check_surroundings()
        return plan, [*grad_features, *grad_weights, *grad_biases]

    def _reached(self, wanted: Sequence[bool], arrives: Sequence[bool]) -> tuple[bool, ...]:
        """What is wanted and reached by some gradient; nobody may ask for more."""
        fused, *unimodal = arrives
        features = [own or (fused and self.case.encoder_leak) for own in unimodal]
        weights = [fused or (own and self.case.head_leak) for own in unimodal]
        reached = (*features, *weights, any(weights))
        return tuple(bool(w and r) for w, r in zip(wanted, reached, strict=True))

    def _mix(self, main: Bounded | None, other: Bounded | None, leak: float):
        """main + leak * other as a GEMM operand, and the factor of the product; None: no flow."""
        if leak == 0:
            other = None
        if main is not None and other is not None:
            return (main + other.scaled(leak)).rounded(self.case.dtype), 1.0
        if main is not None:
            return main, 1.0
        return None if other is None else (other, leak)

    def _check_product(self, out, source, operand, absent=None):
        gradient, scale = source
        product = matmul(gradient, operand, self.tf32).scaled(scale)
        if absent is not None:
            product = product.without_rows(absent)
        check(out, product.rounded(self.case.dtype))


class Slice:
    """Columns [begin, begin + width) of a tensor, as far as launches and checks are concerned."""

    def __init__(self, whole, begin, width):
        self.whole, self.dtype = whole, whole.dtype
        self.name = f"{whole.name}[:, {begin}:{begin + width}]"
        self.columns = slice(begin, begin + width)
        item = whole.elements.itemsize
        self.pair = (whole.pair[0] + begin * item, whole.pair[1])

    @property
    def values(self):
        return self.whole.values[:, self.columns]

    @property
    def stored(self):
        return np.ascontiguousarray(self.whole.elements[:, self.columns])

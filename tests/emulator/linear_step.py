"""Training steps of the linear head: problems, and what their launch must return."""

from __future__ import annotations

from dataclasses import dataclass, field

from emulator.bounded import Bounded, add, matmul
from emulator.harness import check, check_untouched, launch, uses_tf32
from emulator.linear import LinearCase, LinearProblem
from emulator.losses import LossCase, Losses


@dataclass(frozen=True)
class LinearStepCase(LinearCase):
    loss: LossCase = field(default_factory=LossCase)

    def __str__(self):
        return f"step-{super().__str__()}-{self.loss}"


EVEN = LossCase(alpha=(1.5, 1.5))  # the gradients of both features then have one scale


class LinearStepProblem(LinearProblem):
    """A case in memory."""

    case: LinearStepCase
    watched = None  # from the plan, how many bytes of the workspace to count the reads of

    def __init__(self, module, case: LinearStepCase):
        super().__init__(module, case)
        self.losses = Losses(self.memory, case.loss, case.rows, case.classes, self.masks)
        self.output = "float32" if case.dtype == "float16" else case.dtype

    def run_step(self, races=False):
        case, memory, losses = self.case, self.memory, self.losses
        count = len(case.widths)
        wanted = case.wanted or (True,) * (2 * count + 1)
        shapes = [(case.rows, w) for w in case.widths]
        grad_features = [
            memory.place(f"grad_feature {i}", shape, dtype=self.output)
            for i, shape in enumerate(shapes)
        ]
        grad_weights = self._matrices("grad_weight", dtype=self.output)
        if count == 2 and shapes[0] == shapes[1]:  # as the binding does
            first, second = (pair[0] for pair in self.common["weight"])
            grad_features.sort(key=lambda t: t.pair[0], reverse=second < first)
            if not case.concat:
                grad_weights.sort(key=lambda t: t.pair[0])
        grad_biases = [
            memory.place(f"grad_bias {i}", (1, case.classes), dtype=self.output)
            for i in range(1 if case.concat else count)
        ]
        problem = self.common | losses.problem
        problem |= {
            "encoder_leak": case.encoder_leak,
            "head_leak": case.head_leak,
            "grad_feature": [
                t.pair if w else None for t, w in zip(grad_features, wanted[:count], strict=True)
            ],
            "grad_weight": [
                t.pair if w else None for t, w in zip(grad_weights, wanted[count:-1], strict=True)
            ],
        }
        addresses = [b.buffer.address for b in self.biases]
        if case.bias and case.concat:
            problem |= {"fused_bias": addresses[0], "branch_bias": addresses * count}
        elif case.bias:
            problem["branch_bias"] = addresses
        targets = [b.buffer.address for b in grad_biases]
        if wanted[-1] and case.concat:
            problem["grad_fused_bias"] = targets[0]
        elif wanted[-1]:
            problem["grad_branch_bias"] = targets
        memory.check_poison()
        plan = launch(
            self.module, "linear_head_step", problem, self.precision, case.schedule,
            self.request, races, self.watched,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)

        r = losses.residuals(self._logits())
        losses.check()
        any_feature, any_head = any(wanted[:count]), any(wanted[count:])
        mixed = (any_feature and case.encoder_leak) or (any_head and case.head_leak)
        planes = [t.scaled(losses.weight(k)) if mixed else t for k, t in enumerate(r)]
        for i in range(count):
            feature, weight = self._feature(i), memory.bounded(self.weights[i])
            absent = self.absent[i]
            if wanted[i]:
                terms = [planes[i + 1]] + [planes[0].scaled(case.encoder_leak)] * bool(
                    case.encoder_leak
                )
                scale = losses.scale(0 if mixed else i + 1)
                product = self._product(terms, weight, scale, absent)
                check(grad_features[i], product)
                assert not grad_features[i].values[absent].any(), "gradient of an absent row"
            else:
                check_untouched(grad_features[i])
            if wanted[count + i]:
                terms = [planes[0]] + [planes[i + 1].scaled(case.head_leak)] * bool(case.head_leak)
                check(grad_weights[i], self._product(terms, feature, losses.scale(0), None, True))
            elif not case.concat:
                check_untouched(grad_weights[i])
        for i, out in enumerate(grad_biases):
            if not wanted[-1]:
                check_untouched(out)
                continue
            terms = [planes[0]]
            if case.head_leak:
                branches = planes[1:] if case.concat else [planes[i + 1]]
                terms += [t.scaled(case.head_leak) for t in branches]
            total = add(terms).rounded(case.dtype).sum_rows().scaled(losses.scale(0))
            check(out, total.rounded(self.output))
        memory.check_surroundings()
        return plan, [*losses.outputs, *grad_features, *grad_weights, *grad_biases]

    def _logits(self) -> list[Bounded]:
        case, bounded = self.case, self.memory.bounded
        partial = [
            matmul(self._feature(i), bounded(w).T, self.tf32) for i, w in enumerate(self.weights)
        ]
        biases = [bounded(b) for b in self.biases]
        branch = biases * len(partial) if case.concat else biases
        fused = partial[0]
        for term in partial[1:] + biases:
            fused = fused + term
        if not branch:
            return [fused, *partial]
        return [fused, *(s + b for s, b in zip(partial, branch, strict=True))]

    def _product(self, terms, operand, scale, absent, transposed=False):
        plane = add(terms).rounded(self.case.dtype)
        product = matmul(plane.T if transposed else plane, operand, self.tf32).scaled(scale)
        if absent is not None:
            product = product.without_rows(absent)
        return product.rounded(self.output)

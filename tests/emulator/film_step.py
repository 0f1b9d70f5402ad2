"""Training steps of the FiLM head: problems, and what their launch must return."""

from __future__ import annotations

from dataclasses import dataclass, field

from emulator.film import FilmCase, FilmProblem
from emulator.harness import check, check_untouched, launch, uses_tf32
from emulator.losses import LossCase, Losses


@dataclass(frozen=True)
class FilmStepCase(FilmCase):
    loss: LossCase = field(default_factory=LossCase)

    def __str__(self):
        return f"step-{super().__str__()}-{self.loss}"


class FilmStepProblem(FilmProblem):
    """A case in memory."""

    case: FilmStepCase

    def __init__(self, module, case: FilmStepCase):
        super().__init__(module, case)
        self.losses = Losses(self.memory, case.loss, case.rows, case.classes, self.masks)
        self.output = "float32" if case.dtype == "float16" else case.dtype

    def run_step(self, races=False):
        case, memory, losses = self.case, self.memory, self.losses
        outs = self._outputs(self.output)
        problem = self.problem | losses.problem
        problem |= {"encoder_leak": case.encoder_leak, "head_leak": case.head_leak}
        for name in case.wanted:
            out = outs[name]
            problem["grad_" + name] = out.buffer.address if "bias" in name else out.pair
        memory.check_poison()
        plan = launch(
            self.module, "film_head_step", problem, self.precision, case.schedule,
            self.request, races,
        )  # fmt: skip
        self.tf32 = uses_tf32(plan, case)

        modulation, logits = self._logits()
        r = losses.residuals(logits)
        losses.check()
        features = set(case.wanted) & {"condition", "target"}
        mixed = (features and case.encoder_leak) or (set(case.wanted) - features and case.head_leak)
        planes = [t.scaled(losses.weight(k)) if mixed else t for k, t in enumerate(r)]
        expected = self._gradients(
            self._halves(modulation), [t.rounded(case.dtype) for t in planes]
        )
        branch = {"condition": 1, "target": 2}
        for name, out in outs.items():
            if name not in case.wanted:
                check_untouched(out)
                continue
            scale = losses.scale(0 if mixed else branch.get(name, 0))
            check(out, expected[name].scaled(scale).rounded(self.output))
        for name, absent in zip(("condition", "target"), self.absent, strict=True):
            if name in case.wanted:
                assert not outs[name].values[absent].any(), "gradient of an absent row"
        memory.check_surroundings()
        return plan, [*losses.outputs, *outs.values()]

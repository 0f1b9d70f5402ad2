"""Cross-entropy of every branch: the inputs of a step that are not tensors of its head, and what
losses, hits and residuals must come of given logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from emulator.bounded import UNIT_ROUNDOFF, Bounded
from emulator.harness import PACKED, Memory, Tensor, absent_rows, check

IGNORED = -7


@dataclass(frozen=True)
class LossCase:
    alpha: tuple[float, ...] = (1.0, 0.5)
    mean: bool = True
    label_smoothing: float = 0.0
    ignored: float = 0.0  # the share of rows whose target is IGNORED
    limit: int = 1 << 26  # of the workspace

    def __str__(self):
        parts = [f"alpha={','.join(map(str, self.alpha))}", "mean" if self.mean else "sum"]
        parts += [f"smooth={self.label_smoothing}"] * bool(self.label_smoothing)
        parts += [f"ignored={self.ignored}"] * bool(self.ignored)
        parts += [f"limit={self.limit}"] * (self.limit < 1 << 26)
        return "-".join(parts)


class Losses:
    """Targets and results of one step, in memory; `masks` has one entry per modality."""

    def __init__(
        self, memory: Memory, case: LossCase, rows: int, classes: int, masks: list[Tensor | None]
    ):
        self.memory, self.case, self.rows, self.classes = memory, case, rows, classes
        random = memory.random
        self.accumulator = "float64" if memory.dtype == "float64" else "float32"
        target = random.integers(0, max(classes, 1), rows)
        target[random.random(rows) < case.ignored] = IGNORED
        self.target = memory.place("target class", (1, rows), target, "int64", PACKED)
        self.alpha = (case.alpha * len(masks))[: len(masks)]
        counted = self.targets != IGNORED
        self.counted = [counted] + [counted & ~absent_rows(m, rows) for m in masks]
        count = len(masks) + 1
        self.total = memory.place("total", (1, 1), None, self.accumulator, PACKED)
        self.losses = memory.place("losses", (1, count), None, self.accumulator, PACKED)
        self.correct = memory.place("correct", (1, count), None, "int64", PACKED)
        self.problem = {
            "target_class": self.target.buffer.address,
            "alpha": list(self.alpha),
            "mean": case.mean,
            "ignore_index": IGNORED,
            "label_smoothing": case.label_smoothing,
            "workspace_limit": case.limit,
            "total": self.total.buffer.address,
            "losses": self.losses.buffer.address,
            "correct": self.correct.buffer.address,
        }

    @property
    def targets(self) -> np.ndarray:
        return np.array(self.target.elements)[0]

    @property
    def outputs(self):
        return [self.total, self.losses, self.correct]

    def divisor(self, k: int) -> int:
        return int(self.counted[k].sum()) if self.case.mean else 1

    def scale(self, k: int) -> float:
        """Of branch k's residuals in the gradients."""
        alpha = 1.0 if k == 0 else self.alpha[k - 1]
        return alpha / self.divisor(k) if self.divisor(k) else 0.0

    def weight(self, k: int) -> float:
        """The same relative to 1 / n, for planes that mix branches."""
        if k == 0:
            return 1.0
        return self.scale(k) * self.divisor(0)

    def wanted(self) -> np.ndarray:
        smoothing = self.case.label_smoothing
        wanted = np.full((self.rows, self.classes), smoothing / max(self.classes, 1))
        valid = np.flatnonzero(self.targets != IGNORED)
        wanted[valid, self.targets[valid]] += 1 - smoothing
        return wanted

    def residuals(self, logits: list[Bounded]) -> list[Bounded]:
        """Softmax minus the wanted distribution, 0 in rows that do not count; also what check()
        compares with."""
        self.expected = []
        self.hits = []
        return [self._branch(k, z) for k, z in enumerate(logits)]

    def _branch(self, k: int, z: Bounded) -> Bounded:
        unit = UNIT_ROUNDOFF[self.accumulator]
        rows, value = self.counted[k], z.value
        slack = np.where(np.isfinite(value), z.error, 0).max(1, initial=0, keepdims=True)
        with np.errstate(all="ignore"):
            largest = value.max(1, initial=-np.inf, keepdims=True)
            terms = np.exp(value - largest)
            total = terms.sum(1, keepdims=True)
            p = terms / total
            distance = np.where(np.isfinite(value - largest), np.abs(value - largest), 0)
            relative = 2 * slack + unit * (2 * distance + self.classes + 12)
            wanted = self.wanted()
            residual = p - wanted
            error = p * np.expm1(relative) + unit * (np.abs(residual) + p + 3 * wanted)
            log_p = value - largest - np.log(total)
        residual[~rows] = 0
        error[~rows] = 0
        smoothing = self.case.label_smoothing
        row = np.flatnonzero(rows)
        with np.errstate(all="ignore"):
            loss = -log_p[row, self.targets[row]] * (1 - smoothing)
            if smoothing:
                loss -= smoothing * log_p[row].mean(1)
            size = np.abs(log_p[row]).max(1, initial=0) + np.abs(largest[row, 0])
        size = np.where(np.isfinite(size), size, 0)
        loss_error = 2 * slack[row, 0] + unit * (4 * size + self.classes + 12)
        self.expected.append((loss, loss_error))
        self.hits.append(self._hits(row, value, slack))
        return Bounded(residual, error, self.accumulator)

    def _hits(self, row, value, slack):
        """The least and the most hits that rounding allows."""
        least = most = 0
        for r in row:
            t = self.targets[r]
            others = np.delete(value[r], t)
            exact = not slack[r, 0]  # nothing was rounded, so that ties are ties
            if exact or np.isnan(value[r]).any() or not others.size:
                sure = possible = int(np.argmax(value[r])) == t
            else:
                margin = 2 * slack[r, 0]
                with np.errstate(invalid="ignore"):
                    gap = np.where(others == value[r, t], 0, value[r, t] - others)
                sure, possible = (gap > margin).all(), (gap >= -margin).all()
            least, most = least + sure, most + possible
        return least, most

    def check(self):
        losses, errors = [], []
        for k, (loss, error) in enumerate(self.expected):
            count = self.divisor(k)
            with np.errstate(all="ignore"):
                if self.case.mean and count == 0:
                    losses.append(0.0 if k and self.divisor(0) else np.nan)
                    errors.append(0.0)
                else:
                    losses.append(loss.sum() / count)
                    errors.append(error.sum() / count)
        with np.errstate(all="ignore"):
            value = losses[0] + np.dot(self.alpha, losses[1:])
            error = errors[0] + np.dot(np.abs(self.alpha), errors[1:])
        check(self.losses, Bounded(losses, errors, self.accumulator).rounded(self.accumulator))
        check(self.total, Bounded(value, error, self.accumulator).rounded(self.accumulator))
        correct = np.array(self.correct.elements)[0]
        for got, (least, most) in zip(correct, self.hits, strict=True):
            assert least <= got <= most, f"correct: got {correct}, expected {self.hits}"

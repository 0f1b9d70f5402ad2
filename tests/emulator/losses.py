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
    class_weight: bool = False
    sample_weight: bool = False
    soft: str = ""  # the dtype of soft targets, which then take the place of the classes

    def __str__(self):
        parts = [f"alpha={','.join(map(str, self.alpha))}", "mean" if self.mean else "sum"]
        parts += [f"smooth={self.label_smoothing}"] * bool(self.label_smoothing)
        parts += [f"ignored={self.ignored}"] * bool(self.ignored)
        weights = ("class_weight", "sample_weight")
        parts += [name for name in weights if getattr(self, name)] + [self.soft] * bool(self.soft)
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
        self.soft = None
        if case.soft:
            shares = random.dirichlet(np.full(classes, 0.5), rows) if classes else None
            self.soft = memory.place("soft target", (rows, classes), shares, case.soft)
        self.class_weight = self._weights("class_weight", classes, case.class_weight)
        self.sample_weight = self._weights("sample_weight", rows, case.sample_weight)
        counted = (self.targets != IGNORED) | bool(case.soft)
        self.counted = [counted] + [counted & ~absent_rows(m, rows) for m in masks]
        count = len(masks) + 1
        self.total = memory.place("total", (1, 1), None, self.accumulator, PACKED)
        self.branch_losses = memory.place(
            "branch losses", (1, count), None, self.accumulator, PACKED
        )
        self.correct = memory.place("correct", (1, count), None, "int64", PACKED)
        self.count = memory.place("counted", (1, count), None, "int64", PACKED)
        self.losses = memory.place("losses", (count, rows), None, self.accumulator, PACKED)
        self.predictions = memory.place("predictions", (count, rows), None, "int64", PACKED)
        self.problem = {
            "target_class": None if self.soft else self.target.buffer.address,
            "alpha": list(self.alpha),
            "mean": case.mean,
            "ignore_index": IGNORED,
            "label_smoothing": case.label_smoothing,
            "workspace_limit": case.limit,
            "total": self.total.buffer.address,
            "branch_losses": self.branch_losses.buffer.address,
            "correct": self.correct.buffer.address,
            "counted": self.count.buffer.address,
            "losses": self.losses.buffer.address,
            "predictions": self.predictions.buffer.address,
        }
        for name in ("class_weight", "sample_weight"):
            if (tensor := getattr(self, name)) is not None:
                self.problem[name] = tensor.buffer.address
        if self.soft:
            self.problem |= {
                "soft_target": self.soft.pair,
                "soft_dtype": getattr(memory.module.Dtype, case.soft),
            }

    def _weights(self, name: str, size: int, there: bool) -> Tensor | None:
        """Between 0.2 and 2, and every fifth of them 0."""
        if not there:
            return None
        values = self.memory.random.uniform(0.2, 2, (1, size))
        values[:, 4::5] = 0
        return self.memory.place(name, (1, size), values, self.accumulator, PACKED)

    @property
    def targets(self) -> np.ndarray:
        return np.array(self.target.elements)[0]

    @property
    def outputs(self):
        return [
            self.total, self.branch_losses, self.correct, self.count, self.losses, self.predictions
        ]  # fmt: skip

    def row_weights(self, with_class: bool = True) -> np.ndarray:
        weights = np.ones(self.rows)
        if self.sample_weight is not None:
            weights = weights * self.sample_weight.values[0]
        if with_class and self.class_weight is not None and not self.soft:
            weights = weights * self.class_weight.values[0][np.maximum(self.targets, 0)]
        return weights

    def divisor(self, k: int) -> float:
        return float(self.row_weights()[self.counted[k]].sum()) if self.case.mean else 1

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
        """Smoothed and weighted by class."""
        shares = np.zeros((self.rows, self.classes))
        if self.soft:
            shares += self.soft.values
        else:
            valid = np.flatnonzero(self.targets != IGNORED)
            shares[valid, self.targets[valid]] = 1
        smoothing = self.case.label_smoothing
        wanted = (1 - smoothing) * shares + smoothing / max(self.classes, 1)
        return wanted if self.class_weight is None else wanted * self.class_weight.values[0]

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
            mass = wanted.sum(1, keepdims=True)
            residual = mass * p - wanted
            # float32 sums of the target's shares
            error = mass * p * (np.expm1(relative) + unit * (self.classes if self.dense else 0))
            error += unit * (np.abs(residual) + mass * p + 4 * wanted)
            log_p = value - largest - np.log(total)
        residual[~rows] = 0
        error[~rows] = 0
        row = np.flatnonzero(rows)
        with np.errstate(all="ignore"):
            terms = -log_p[row] * wanted[row]
            if not self.dense:  # a masked class must not meet a share of zero
                terms = terms[np.arange(len(row)), self.targets[row]][:, None]
            loss = terms.sum(1)
            size = np.abs(log_p[row]).max(1, initial=0) + np.abs(largest[row, 0])
        size = np.where(np.isfinite(size), size, 0)
        loss_error = 2 * slack[row, 0] + unit * (4 * size + self.classes + 12)
        loss_error = loss_error * np.maximum(mass[row, 0], 1) * (2 if self.dense else 1)
        of_rows = np.zeros((2, self.rows))
        of_rows[:, row] = loss, loss_error
        self.expected.append(of_rows)
        label = self.soft.values.argmax(1) if self.soft and self.classes else self.targets
        self.hits.append(self._hits(row, value, slack, label))
        self._check_predictions(k, value, slack)
        weights = self.row_weights(with_class=False)[:, None]
        return Bounded(
            residual * weights, error * weights + unit * 2 * np.abs(residual), self.accumulator
        )

    @property
    def dense(self) -> bool:
        return bool(self.soft) or self.case.label_smoothing != 0

    def _check_predictions(self, k: int, value, slack):
        """Those of every row, whether it counts or not."""
        predictions = np.array(self.predictions.elements)[k]
        if not self.classes:
            return
        rows = np.arange(self.rows)
        sure = np.isnan(value).any(1) | (slack[:, 0] == 0)
        there = (predictions >= 0) & (predictions < self.classes)
        with np.errstate(invalid="ignore"):
            near = value[rows, predictions * there] >= value.max(1) - 2 * slack[:, 0]
        wrong = ~there | np.where(sure, predictions != value.argmax(1), ~near)
        assert not wrong.any(), (
            f"predictions of branch {k}: {wrong.sum()} of {self.rows} elements wrong"
        )

    def _hits(self, row, value, slack, label):
        """The least and the most hits that rounding allows."""
        least = most = 0
        for r in row:
            t = label[r]
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
        samples = self.row_weights(with_class=False)
        for k, (loss, error) in enumerate(self.expected):
            count = self.divisor(k)
            with np.errstate(all="ignore"):
                if self.case.mean and count == 0:
                    losses.append(0.0 if k and self.divisor(0) else np.nan)
                    errors.append(0.0)
                else:
                    counts = self.counted[k]
                    losses.append((samples * loss)[counts].sum() / count)
                    errors.append((samples * error)[counts].sum() / count)
        with np.errstate(all="ignore"):
            value = losses[0] + np.dot(self.alpha, losses[1:])
            error = errors[0] + np.dot(np.abs(self.alpha), errors[1:])

        def expect(tensor, value, error):
            check(tensor, Bounded(value, error, self.accumulator).rounded(self.accumulator))

        expect(self.branch_losses, losses, errors)
        expect(self.total, value, error)
        expect(self.losses, *(np.stack(part) for part in zip(*self.expected, strict=True)))
        counted = np.array(self.count.elements)[0]
        assert (counted == [c.sum() for c in self.counted]).all(), f"counted: got {counted}"
        correct = np.array(self.correct.elements)[0]
        for got, (least, most) in zip(correct, self.hits, strict=True):
            assert least <= got <= most, f"correct: got {correct}, expected {self.hits}"

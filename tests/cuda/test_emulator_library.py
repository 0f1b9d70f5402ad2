"""How often the executors launch, and how often they read: counted on emulated CUDA."""

from __future__ import annotations

import pytest
from emulator import harness
from emulator.film import FilmCase, FilmProblem
from emulator.film_step import FilmStepCase, FilmStepProblem
from emulator.harness import Schedule, counted
from emulator.linear import LinearCase, LinearProblem
from emulator.linear_step import EVEN, LinearStepCase, LinearStepProblem
from emulator.losses import LossCase

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernels():
    module = harness.load("emulated_kernels")
    if module is None:
        pytest.skip("the emulator is not built (cmake -S tests/emulator -B build/cpp)")
    return module


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launches_of_a_step(kernels, dtype, concat, turned):
    tile = "half_small" if dtype == "bfloat16" else "float32_small"
    shared = {"dtype": dtype, "tile": tile, "concat": concat}
    fused = LinearStepProblem(kernels, LinearStepCase(37, (72, 72), 11, **shared))
    assert counted(kernels, fused, "step") == (1, 0)
    for leak in (0.0, 0.5):
        case = LinearStepCase(
            37, (72, 72), 11, executor="library", head_leak=leak, loss=EVEN, **shared
        )
        problem = LinearStepProblem(kernels, case)
        problem.join_features(turned)
        launches, matmuls = counted(kernels, problem, "step")
        assert launches - matmuls == 2  # the rows, and what is left at the end
        # concat's weights lie in order; if the features do not, logits take a product each
        assert (launches == 5 + turned) if concat else (launches <= 6)
    unequal = LinearStepCase(37, (72, 48), 11, executor="library", **shared)
    assert counted(kernels, LinearStepProblem(kernels, unequal), "step") == (8, 6)


def test_products_of_equal_widths_are_one_call(kernels):
    """Whatever the addresses: weights of concat ascend, and so do these features."""
    case = LinearCase(37, (72, 72), 11, executor="library")
    problem = LinearProblem(kernels, case)
    problem.join_features()
    assert counted(kernels, problem, "forward") == (2, 1)


def test_launches_of_film(kernels):
    case = FilmStepCase(37, 72, 48, 11, executor="library")
    assert counted(kernels, FilmStepProblem(kernels, case), "step") == (10, 6)
    case = FilmCase(37, 72, 48, 11, executor="library")
    assert counted(kernels, FilmProblem(kernels, case), "forward") == (4, 2)


@pytest.mark.parametrize("executor", ["fused", "library"])
@pytest.mark.parametrize(("rows", "classes"), [(40, 6), (40, 34), (9, 309), (7, 1000), (5, 2048)])
def test_each_partial_sum_is_read_once(kernels, executor, rows, classes):
    case = LinearStepCase(
        rows, (72, 40), classes, executor=executor, schedule=Schedule(multiprocessors=12),
        loss=LossCase(limit=1 << 26),
    )  # fmt: skip
    problem = LinearStepProblem(kernels, case)
    padded = -(-classes // 8) * 8

    def partial_sums(plan):
        return sum(plan.forward.splits) * rows * padded * 4

    problem.watched = partial_sums
    plan, _ = problem.run_step(races=True)
    once = sum(plan.forward.splits) * rows * classes * 4
    assert kernels.statistics()["watched_reads"] == once


def test_rows_of_more_classes_are_read_twice(kernels):
    case = LinearStepCase(3, (16, 8), 2500, executor="library", loss=LossCase(limit=1 << 26))
    problem = LinearStepProblem(kernels, case)
    problem.watched = lambda plan: sum(plan.forward.splits) * 3 * 2504 * 4
    problem.run_step(races=True)
    assert kernels.statistics()["watched_reads"] == 2 * 2 * 3 * 2500 * 4


def test_float32_accumulators_of_chunks_in_bfloat16(kernels):
    """A chunk adds to what the one before left, which is rounded once in the end."""
    case = LinearStepCase(
        200, (72, 48), 11, dtype="bfloat16", tile="half_small", executor="library",
        loss=LossCase(limit=1, ignored=0.2), encoder_leak=0.5, absent=(0.3, 0.0),
    )  # fmt: skip
    plan, _ = LinearStepProblem(kernels, case).run_step()
    assert plan.step.chunk_rows < 200
    assert plan.backward.partials

"""Training steps on emulated CUDA against float64, element by element."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import harness
from emulator.draw import TILES, film_step_case, linear_step_case
from emulator.film import OUTPUTS
from emulator.film_step import FilmStepCase, FilmStepProblem
from emulator.harness import Layout, Poison, Schedule
from emulator.linear_step import LinearStepCase, LinearStepProblem
from emulator.losses import LossCase
from support.grids import mostly_slow, one_axis_at_a_time

pytestmark = [pytest.mark.emulator, pytest.mark.gate]

ODD = Layout(aligned=False, gap=1)
TINY = LossCase(limit=1)  # chunks of one tile of rows
# Seeds per head and tile.
RANDOM = mostly_slow(list(range(6)), 2)
RACES = mostly_slow(list(range(2)), 1)

tiles = pytest.mark.parametrize(("tile", "dtype"), TILES, ids=lambda value: value)
layouts = pytest.mark.parametrize("layout", [Layout(), ODD], ids=["aligned", "odd"])


@pytest.fixture(scope="module")
def kernels():
    module = harness.load("emulated_kernels")
    if module is None:
        pytest.skip("the emulator is not built (cmake -S tests/emulator -B build/cpp)")
    return module


def run(module, case, races=False):
    """By both executors; the fused one's plan and tensors are returned."""
    problem = LinearStepProblem if isinstance(case, LinearStepCase) else FilmStepProblem
    problem(module, replace(case, executor="library")).run_step(races)
    return problem(module, case).run_step(races)


@tiles
@pytest.mark.parametrize("seed", RANDOM)
def test_linear_random(kernels, tile, dtype, seed):
    run(kernels, linear_step_case(5000 + seed, tile, dtype))


@tiles
@pytest.mark.parametrize("seed", RACES)
def test_linear_has_no_race(kernels, tile, dtype, seed):
    case = linear_step_case(6000 + seed, tile, dtype)
    run(kernels, replace(case, wanted=()), races=True)
    assert kernels.statistics()["accesses"] > 0


@tiles
@pytest.mark.parametrize("seed", RANDOM)
def test_film_random(kernels, tile, dtype, seed):
    run(kernels, film_step_case(7000 + seed, tile, dtype))


@tiles
def test_film_has_no_race(kernels, tile, dtype):
    run(kernels, replace(film_step_case(8000, tile, dtype), wanted=OUTPUTS), races=True)


@tiles
def test_steps_run_on_the_tile_that_was_asked_for(kernels, tile, dtype):
    linear = LinearStepCase(widths=(72, 48), tile=tile, dtype=dtype)
    film = FilmStepCase(condition_width=72, hidden=48, tile=tile, dtype=dtype)
    for name, case in (("LinearStep", linear), ("FilmStep", film)):
        plan, _ = run(kernels, case)
        assert plan.launch.tile.name == tile
        assert plan.launch.aligned == (dtype != "float64")
        key = getattr(kernels.Dtype, dtype), plan.launch.tile, plan.launch.aligned
        size, _ = kernels.kernels()[name][key]
        assert kernels.statistics()["shared_bytes"] == size


@layouts
@pytest.mark.parametrize(
    ("rows", "widths", "classes"),
    [
        (0, (24, 16), 11),
        (1, (1,), 1),
        (1, (1, 1), 1),
        (33, (31, 17, 5), 3),
        (256, (64, 8), 34),
        (13, (3, 9, 1, 2, 7, 5, 4, 6), 2),
        (40, (3, 9, 1, 2), 5),
        (31, (512, 509), 6),
        (129, (130, 16), 131),
        (37, (24, 0), 5),
    ],
)
def test_linear_sizes(kernels, rows, widths, classes, layout):
    for concat in (True, False):
        case = LinearStepCase(
            rows, widths, classes, layout=layout, concat=concat, encoder_leak=0.5, head_leak=0.5
        )
        run(kernels, case)
        run(kernels, replace(case, encoder_leak=0.0, head_leak=0.0, loss=TINY))


@layouts
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "classes"),
    [(0, 24, 16, 11), (1, 1, 1, 1), (21, 8, 6, 1), (150, 16, 40, 34), (33, 131, 127, 3)],
)
def test_film_sizes(kernels, rows, width, hidden, classes, layout):
    for leak in (0.0, 0.5):
        case = FilmStepCase(
            rows, width, hidden, classes, layout=layout, encoder_leak=leak, head_leak=leak
        )
        run(kernels, case)
        run(kernels, replace(case, loss=TINY))


LEAKS = [(0, 0.25), (0, 0), (1, 1), (0.25, 0)]


@one_axis_at_a_time(leaks=LEAKS, mean=[True, False], absent=[(0.4, 0.3), (0.0, 1.0), (1.0, 0.0)])
def test_film_leaks_with_absent_rows(kernels, leaks, mean, absent):
    encoder, head = leaks
    loss = LossCase(alpha=(1.5, -0.5), mean=mean, ignored=0.2)
    case = FilmStepCase(
        70, 72, 48, 11, encoder_leak=encoder, head_leak=head, absent=absent, loss=loss
    )
    run(kernels, case)
    run(kernels, replace(case, loss=replace(loss, limit=1), dtype="bfloat16", tile="half_small"))


@pytest.mark.parametrize("wanted", OUTPUTS)
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_film_computes_only_what_is_wanted(kernels, wanted, leak):
    case = FilmStepCase(
        70, 72, 48, 11, wanted=(wanted,), encoder_leak=leak, head_leak=leak, absent=(0.3, 0.3)
    )
    run(kernels, case)
    run(kernels, replace(case, loss=TINY))


@one_axis_at_a_time(leaks=LEAKS, concat=[True, False], mean=[True, False])
def test_leaks_with_absent_rows(kernels, concat, leaks, mean):
    """The means of the branches have divisors of their own."""
    encoder, head = leaks
    case = LinearStepCase(
        70, (72, 48, 24), 11, concat=concat, encoder_leak=encoder, head_leak=head,
        absent=(0.3, 0.0, 1.0), loss=LossCase(alpha=(1.0, -0.5, 2.0), mean=mean, ignored=0.2),
    )  # fmt: skip
    run(kernels, case)
    run(kernels, replace(case, loss=replace(case.loss, limit=1)))


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_linear_computes_only_what_is_wanted(kernels, wanted, leak):
    case = LinearStepCase(
        widths=(72, 48), concat=False, wanted=tuple(i == wanted for i in range(5)),
        encoder_leak=leak, head_leak=leak, absent=(0.3, 0.3),
    )  # fmt: skip
    plan, _ = run(kernels, case)
    assert plan.step.gradients


@pytest.mark.parametrize("loss", [LossCase(), TINY], ids=["whole", "chunked"])
def test_evaluation_computes_losses_only(kernels, loss):
    linear = LinearStepCase(rows=100, wanted=(False,) * 5, head_leak=0.5, loss=loss)
    for case in (linear, FilmStepCase(rows=100, wanted=(), head_leak=0.5, loss=loss)):
        plan, _ = run(kernels, case)
        assert not plan.step.gradients
        assert plan.step.plane_count == 0


@one_axis_at_a_time(classes=[11, 1], smoothing=[0.1, 0.0, 1.0], ignored=[0.3, 0.0, 1.0])
def test_losses(kernels, classes, smoothing, ignored):
    """All ignored: a mean is NaN, a sum 0, and every gradient 0."""
    for mean in (True, False):
        loss = LossCase(mean=mean, label_smoothing=smoothing, ignored=ignored)
        _, tensors = run(kernels, LinearStepCase(40, (16, 24), classes, loss=loss))
        (total, losses, correct, *_), grads = tensors[:6], tensors[6:]
        if ignored == 1:
            assert np.isnan(losses.values).all() if mean else not losses.values.any()
            assert np.isnan(total.values).all() == mean
            assert not correct.elements.any()
            assert not any(g.values.any() for g in grads)


@one_axis_at_a_time(
    weights=[("class_weight", "sample_weight"), ("class_weight",), ("sample_weight",), ()],
    soft=["", "float32", "bfloat16", "float16", "float64"],
    smoothing=[0.1, 0.0],
    mean=[True, False],
    classes=[11, 1, 300, 2500],
    leak=[0.0, 0.5],
    executor=["fused", "library"],
    kind=[("float32", "float32_small"), ("bfloat16", "half_small"), ("float64", "float64")],
)
def test_weights_and_soft_targets(
    kernels, weights, soft, smoothing, mean, classes, leak, executor, kind
):
    dtype, tile = kind
    loss = LossCase(
        alpha=(0.5, -2.0), mean=mean, label_smoothing=smoothing, ignored=0.2, soft=soft, limit=1,
        **dict.fromkeys(weights, True),
    )  # fmt: skip
    shared = {"dtype": dtype, "tile": tile, "executor": executor, "loss": loss}
    shared |= {"encoder_leak": leak, "head_leak": leak / 2, "absent": (0.3, 0.4)}
    rows = 70 if classes < 300 else 5
    run(kernels, LinearStepCase(rows, (16, 24), classes, **shared))
    run(kernels, FilmStepCase(rows, 16, 24, classes, **shared))


@one_axis_at_a_time(
    modalities=[8, 3],
    kind=[("float64", "float64"), ("float32", "float32_small")],
    soft=["float64", ""],
    executor=["library", "fused"],
)
def test_many_branches_of_many_classes(kernels, modalities, kind, soft, executor):
    """A thread's slots hold fewer columns of each."""
    shared = dict(zip(("dtype", "tile"), kind, strict=True), executor=executor)
    case = LinearStepCase(5, (8,) * modalities, 600, loss=LossCase(soft=soft), **shared)
    run(kernels, case)


def test_weights_of_zero(kernels):
    """No weight at all: a mean is NaN, and every gradient 0."""
    case = LinearStepCase(40, (16, 24), 11, loss=LossCase(sample_weight=True))
    problem = LinearStepProblem(kernels, case)
    problem.losses.sample_weight.elements[...] = 0
    _, tensors = problem.run_step()
    assert np.isnan(tensors[0].values).all()
    assert not any(grad.values.any() for grad in tensors[6:])


def test_a_modality_that_no_counted_row_has_costs_nothing(kernels):
    case = LinearStepCase(widths=(72, 48), absent=(0.0, 1.0), encoder_leak=0.5)
    _, (_, losses, correct, *_) = run(kernels, case)
    assert losses.values[0, 2] == 0
    assert correct.elements[0, 2] == 0


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_the_first_of_equal_maxima_is_the_prediction(kernels, value):
    """Features of zero leave the bias: equal maxima, or NaN, which counts as the largest."""
    case = LinearStepCase(rows=70, widths=(16,), classes=70)
    problem = LinearStepProblem(kernels, case)
    problem.features[0].elements[...] = 0
    bias = problem.biases[0]
    bias.elements[...] = 0
    bias.elements[0, [37, 40, 69]] = value
    targets = problem.losses.target
    targets.elements[0, : len(targets.elements[0])] = np.arange(70)
    _, tensors = problem.run_step()
    assert tensors[2].elements.tolist() == [[1, 1]]
    targets.elements[0, 37] = 36
    _, tensors = problem.run_step()
    assert tensors[2].elements.tolist() == [[0, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bias_of_minus_infinity_masks_a_class(kernels, smoothing):
    case = LinearStepCase(
        40, (16, 24), 40, loss=LossCase(label_smoothing=smoothing),
        poison=(Poison("bias 0", 0, 35, -np.inf),),
    )  # fmt: skip
    problem = LinearStepProblem(kernels, case)
    targets = problem.losses.target.elements
    targets[targets == 35] = 3
    _, (total, *_) = problem.run_step()
    assert np.isfinite(total.values).all() == (smoothing == 0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_poison_stays_in_its_row(kernels, value):
    for absent in ((), (0.3, 0.3)):
        case = LinearStepCase(
            37, (72, 48), 11, poison=(Poison("feature 1", 36, 44, value),), absent=absent
        )
        _, (total, *others) = run(kernels, case)
        assert not np.isfinite(total.values).all()
        for grad in others[5:7]:
            assert np.isfinite(grad.values[:36]).all()


@pytest.mark.parametrize("target", [11, -1, 1 << 40])
def test_a_target_out_of_range_is_a_device_side_assertion(kernels, target):
    problem = LinearStepProblem(kernels, LinearStepCase())
    problem.losses.target.elements[0, 20] = target
    with pytest.raises(kernels.EmulatorError, match="device-side assertion: target"):
        problem.run_step()


@tiles
def test_chunks_are_what_the_whole_is(kernels, tile, dtype):
    """To rounding; and what a chunk leaves is added to, however many row splits there are."""
    medium = "medium" in tile
    case = LinearStepCase(
        150 if medium else 100, (72, 48), 11, tile=tile, dtype=dtype, head_leak=0.5,
        absent=(0.3, 0.0), loss=LossCase(ignored=0.2),
    )  # fmt: skip
    whole, _ = run(kernels, case)
    assert whole.step.chunk_rows == case.rows
    for splits in (0, 2):
        chunked, _ = run(kernels, replace(case, splits=splits, loss=replace(case.loss, limit=1)))
        assert chunked.step.chunk_rows == (64 if medium else 32)
        splits_rows = chunked.backward.row_splits > 1
        assert chunked.backward.partials == (dtype == "bfloat16" or splits_rows)


def test_the_workspace_limit_holds(kernels):
    previous = None
    for limit in (1 << 26, 200_000, 100_000, 50_000):
        case = LinearStepCase(500, (72, 48), 40, loss=LossCase(limit=limit))
        plan, _ = run(kernels, case)
        assert plan.launch.workspace_bytes <= limit + 4096  # sums per CTA
        assert previous is None or plan.step.chunk_rows < previous
        previous = plan.step.chunk_rows


def test_long_thin_weight_gradients_split_the_rows(kernels):
    case = LinearStepCase(
        rows=3000, widths=(24, 16), classes=3, schedule=Schedule(multiprocessors=24)
    )
    plan, _ = run(kernels, case)
    assert plan.backward.row_splits > 1


@pytest.mark.parametrize(("tile", "dtype"), [t for t in TILES if "medium" not in t[0]])
def test_same_bits_on_every_schedule(kernels, tile, dtype):
    shared = {"tile": tile, "dtype": dtype, "splits": 3, "head_leak": 0.5, "absent": (0.2, 0.2)}
    linear = LinearStepCase(70, (136, 40), 43, loss=LossCase(ignored=0.1, limit=1), **shared)
    film = FilmStepCase(70, 72, 40, 11, loss=LossCase(ignored=0.1, limit=1), **shared)
    for case in (linear, replace(linear, loss=LossCase(ignored=0.1)), film):
        bits = []
        for seed in range(4):
            schedule = Schedule(
                seed=seed,
                policy=kernels.policies[seed % 4],
                delivery=kernels.deliveries[seed % 3],
                multiprocessors=4,
            )
            _, tensors = run(kernels, replace(case, schedule=schedule))
            bits.append([np.array(t.stored).tobytes() for t in tensors])
        assert all(b == bits[0] for b in bits)


@pytest.mark.parametrize(
    ("dtype", "to"),
    [("float64", "float64"), ("float32", "float32"), ("float32", "float16"),
     ("bfloat16", "bfloat16"), ("float16", "float16")],
)  # fmt: skip
@pytest.mark.parametrize("factor", [3.0, 1.0, 1 / 3])
def test_scaled_gradients(kernels, dtype, to, factor):
    """Several arrays of several work items each, rounded once; by 1 in place changes nothing."""
    memory = harness.Memory(kernels, ODD, dtype, 1, ())
    sizes = (1, 5000, 33)
    grads = [memory.input(f"grad {i}", (1, n)) for i, n in enumerate(sizes)]
    outs = [memory.place(f"scaled {i}", (1, n), dtype=to) for i, n in enumerate(sizes)]
    accumulator = "float64" if dtype == "float64" else "float32"
    scale = memory.place("scale", (1, 1), np.array([[factor]]), accumulator)
    exact = harness.STORAGE[accumulator].type(scale.values[0, 0])
    wanted = [harness.encode(g.values.astype(exact.dtype) * exact, to) for g in grads]

    def launch(targets):
        kernels.scale_gradients(
            [g.buffer.address for g in grads], [t.buffer.address for t in targets], list(sizes),
            scale.buffer.address, getattr(kernels.Dtype, dtype), dtype != to,
        )  # fmt: skip
        for target, values in zip(targets, wanted, strict=True):
            assert (np.array(target.elements) == values).all()

    launch(outs)
    if dtype == to:
        launch(grads)
    memory.check_surroundings()

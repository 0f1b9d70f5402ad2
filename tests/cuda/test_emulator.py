"""Every kernel, dtype and tile on emulated CUDA against float64, element by element."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import harness
from emulator.draw import TILES, film_case, linear_case
from emulator.film import OUTPUTS, FilmCase, FilmProblem
from emulator.harness import Layout, Poison, Schedule
from emulator.linear import LinearCase, LinearProblem
from support.grids import mostly_slow

pytestmark = [pytest.mark.emulator, pytest.mark.gate]

ODD = Layout(aligned=False, gap=1)
# Seeds per head, direction and tile.
RANDOM = mostly_slow(list(range(6)), 2)
RACES = mostly_slow(list(range(2)), 1)


@pytest.fixture(scope="module")
def kernels():
    module = harness.load("emulated_kernels")
    if module is None:
        pytest.skip("the emulator is not built (cmake -S tests/emulator -B build/cpp)")
    return module


def run(module, case, direction, races=False):
    """By both executors; the fused one's plan and tensors are returned."""
    problem = LinearProblem if isinstance(case, LinearCase) else FilmProblem
    by_library = problem(module, replace(case, executor="library"))
    getattr(by_library, "run_" + direction)(races)
    return getattr(problem(module, case), "run_" + direction)(races)


directions = pytest.mark.parametrize("direction", ["forward", "backward"])
tiles = pytest.mark.parametrize(("tile", "dtype"), TILES, ids=lambda value: value)
SMALL = [tile for tile in TILES if "medium" not in tile[0]]
small_tiles = pytest.mark.parametrize(("tile", "dtype"), SMALL, ids=lambda value: value)


@directions
@tiles
@pytest.mark.parametrize("seed", RANDOM)
def test_linear_random(kernels, tile, dtype, seed, direction):
    run(kernels, linear_case(1000 + seed, tile, dtype), direction)


@directions
@tiles
@pytest.mark.parametrize("seed", RANDOM)
def test_film_random(kernels, tile, dtype, seed, direction):
    run(kernels, film_case(2000 + seed, tile, dtype), direction)


def check_shared_memory(module, head, dtype, shape):
    """The launch asks for what the kernel's struct says, and the table of resources records."""
    size, _ = module.kernels()[head][getattr(module.Dtype, dtype), shape.tile, shape.aligned]
    assert module.statistics()["shared_bytes"] == size


@directions
@tiles
def test_linear_runs_on_the_tile_that_was_asked_for(kernels, tile, dtype, direction):
    case = LinearCase(widths=(72, 48), tile=tile, dtype=dtype)
    plan, _ = run(kernels, case, direction)
    assert plan.launch.tile.name == tile
    assert plan.launch.aligned == (dtype != "float64")
    check_shared_memory(kernels, "Linear" + direction.capitalize(), dtype, plan.launch)


@directions
@tiles
def test_film_runs_on_the_tile_that_was_asked_for(kernels, tile, dtype, direction):
    case = FilmCase(condition_width=72, hidden=48, tile=tile, dtype=dtype)
    plan, _ = run(kernels, case, direction)
    assert plan.launch.tile.name == tile
    assert plan.launch.aligned == (dtype != "float64")
    check_shared_memory(kernels, "Film" + direction.capitalize(), dtype, plan.launch)


@directions
@tiles
@pytest.mark.parametrize("seed", RACES)
def test_linear_has_no_race(kernels, tile, dtype, seed, direction):
    case = linear_case(3000 + seed, tile, dtype)
    case = replace(case, arrives=(), wanted=())
    run(kernels, case, direction, races=True)
    assert kernels.statistics()["accesses"] > 0


@directions
@tiles
@pytest.mark.parametrize("seed", RACES)
def test_film_has_no_race(kernels, tile, dtype, seed, direction):
    case = film_case(4000 + seed, tile, dtype)
    case = replace(case, arrives=(True,) * 3, wanted=OUTPUTS)
    run(kernels, case, direction, races=True)


@directions
@pytest.mark.parametrize("layout", [Layout(), ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("rows", "widths", "classes"),
    [
        (0, (24, 16), 11),
        (1, (1,), 1),
        (1, (1, 1), 1),
        (21, (8,), 6),
        (33, (31, 17, 5), 3),
        (256, (64, 8), 34),
        (13, (3, 9, 1, 2, 7, 5, 4, 6), 2),
        (31, (512, 509), 6),
        (129, (130, 16), 131),
    ],
)
def test_linear_sizes(kernels, rows, widths, classes, layout, direction):
    for concat in (True, False):
        case = LinearCase(rows, widths, classes, layout=layout, concat=concat, head_leak=0.5)
        run(kernels, case, direction)


@directions
@pytest.mark.parametrize("layout", [Layout(), ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "classes"),
    [(0, 24, 16, 11), (1, 1, 1, 1), (21, 8, 6, 1), (256, 16, 40, 34), (33, 131, 127, 3)],
)
def test_film_sizes(kernels, rows, width, hidden, classes, layout, direction):
    for leak in (0.0, 0.5):
        case = FilmCase(
            rows, width, hidden, classes, layout=layout, encoder_leak=leak, head_leak=leak
        )
        run(kernels, case, direction)


@directions
@pytest.mark.parametrize("leaks", [(0, 0), (1, 1), (0.25, 0), (0, 0.25)])
@pytest.mark.parametrize("missing", range(3))
def test_missing_branches(kernels, missing, leaks, direction):
    """An incoming gradient that is not there contributes nothing and leaves None behind."""
    arrives = tuple(k != missing for k in range(3))
    encoder, head = leaks
    for case in (LinearCase(widths=(72, 48)), FilmCase(condition_width=72, hidden=48)):
        case = replace(case, encoder_leak=encoder, head_leak=head, arrives=arrives)
        run(kernels, case, direction)
        run(kernels, replace(case, arrives=tuple(not a for a in arrives)), direction)


@pytest.mark.parametrize("wanted", range(5))
def test_linear_computes_only_what_is_wanted(kernels, wanted):
    case = LinearCase(widths=(72, 48), concat=False, wanted=tuple(i == wanted for i in range(5)))
    run(kernels, case, "backward")


@pytest.mark.parametrize("wanted", OUTPUTS)
def test_film_computes_only_what_is_wanted(kernels, wanted):
    for leak in (0.0, 0.5):
        case = FilmCase(wanted=(wanted,), encoder_leak=leak, head_leak=leak)
        run(kernels, case, "backward")


def test_nothing_wanted_writes_nothing(kernels):
    run(kernels, LinearCase(wanted=(False,) * 5), "backward")
    run(kernels, FilmCase(wanted=()), "backward")


@pytest.mark.parametrize("concat", [True, False])
def test_one_unimodal_gradient_reaches_its_own_parameters(kernels, concat):
    case = LinearCase(concat=concat, arrives=(False, False, True), head_leak=0.3)
    run(kernels, case, "backward")


def test_long_thin_weight_gradients_split_the_rows(kernels):
    """Many rows, few classes: what a segmentation head looks like."""
    case = LinearCase(rows=3000, widths=(24, 16), classes=3, schedule=Schedule(multiprocessors=24))
    plan, _ = run(kernels, case, "backward")
    assert plan.row_splits > 1


@pytest.mark.parametrize("races", [False, True], ids=["values", "races"])
@pytest.mark.parametrize("arrives", [(True, True, True), (True, False, False)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_thin_film_gradients_split_the_rows(kernels, dtype, arrives, races):
    rows = 300 if races else 3001
    case = FilmCase(
        rows=rows,
        condition_width=24,
        hidden=16,
        classes=3,
        dtype=dtype,
        tile="half_small" if dtype == "bfloat16" else "float32_small",
        splits=3 if races else 0,
        head_leak=0.5,
        arrives=arrives,
        schedule=Schedule(multiprocessors=24),
    )
    plan, _ = run(kernels, case, "backward", races)
    assert plan.row_splits > 1
    assert plan.out_splits > 1
    for wanted in OUTPUTS:
        run(kernels, replace(case, wanted=(wanted,)), "backward", races)


def outputs_bits(tensors):
    return [np.array(t.stored).tobytes() for t in tensors]


@directions
@small_tiles
def test_same_bits_on_every_schedule(kernels, tile, dtype, direction):
    linear = LinearCase(41, (136, 40), 43, tile=tile, dtype=dtype, splits=3, head_leak=0.5)
    film = FilmCase(41, 136, 40, 43, tile=tile, dtype=dtype, splits=3, head_leak=0.5)
    for case in (linear, film):
        bits = []
        for seed in range(6):
            schedule = Schedule(
                seed=seed,
                policy=kernels.policies[seed % 4],
                delivery=kernels.deliveries[seed % 3],
                multiprocessors=4,
            )
            _, tensors = run(kernels, replace(case, schedule=schedule), direction)
            bits.append(outputs_bits(tensors))
        assert all(b == bits[0] for b in bits)


@pytest.mark.parametrize("layout", [Layout(), ODD], ids=["aligned", "odd"])
def test_offsets_beyond_32_bits(kernels, layout):
    """Rows so far apart that their byte and element offsets pass 2^32."""
    far = replace(layout, gap=1 << 31)
    for direction in ("forward", "backward"):
        case = LinearCase(3, (16, 8), 2, layout=layout, concat=False)
        problem = LinearProblem(kernels, case)
        spread = [
            problem.memory.input(f"far feature {i}", (3, w), layout=far)
            for i, w in enumerate(case.widths)
        ]
        problem.features = spread
        problem.common["feature"] = [t.pair for t in spread]
        getattr(problem, "run_" + direction)()


def poisons(test):
    """With values that are not finite; numpy warns where the reference computes with them."""
    test = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")(test)
    values = mostly_slow([np.nan, np.inf, -np.inf], 1)
    return pytest.mark.parametrize("value", values, ids=str)(test)


layouts = pytest.mark.parametrize("layout", [Layout(), ODD], ids=["aligned", "odd"])


def check_rows(case, tensors, row):
    """Beside the comparison with the reference: the rows of the batch do not meet."""
    for tensor in tensors:
        values = tensor.values
        if len(values) == case.rows:
            assert np.isfinite(np.delete(values, row, 0)).all(), tensor.name


@directions
@small_tiles
@layouts
@poisons
def test_linear_poison_stays_in_its_row(kernels, tile, dtype, layout, value, direction):
    """NaN or inf in one row: that row and the sums over rows that contain it, nothing else."""
    names = ["feature 0", "feature 1"]
    if direction == "backward":
        names += ["incoming 0", "incoming 1", "incoming 2"]
    for i, name in enumerate(names):
        row, column = (0, 36, 5, 31, 32)[i], (3, 44, 0, 10, 7)[i]
        case = LinearCase(
            rows=37,
            widths=(72, 48),
            classes=11,
            tile=tile,
            dtype=dtype,
            layout=layout,
            concat=i % 2 == 0,
            splits=i % 3,
            encoder_leak=(0.0, 0.5)[i % 2],
            head_leak=(0.0, 0.25)[i // 2 % 2],
            poison=(Poison(name, row, column, value),),
        )
        _, tensors = run(kernels, case, direction)
        check_rows(case, tensors, row)
        assert not all(np.isfinite(t.values).all() for t in tensors)


@directions
@small_tiles
@layouts
@poisons
def test_film_poison_stays_in_its_row(kernels, tile, dtype, layout, value, direction):
    names = ["condition", "target"]
    if direction == "backward":
        names += ["modulation", "incoming 0", "incoming 1", "incoming 2"]
    for i, name in enumerate(names):
        row, column = (0, 36, 5, 31, 32, 33)[i], (69, 44, 50, 10, 7, 0)[i]
        case = FilmCase(
            rows=37,
            condition_width=72,
            hidden=48,
            classes=11,
            tile=tile,
            dtype=dtype,
            layout=layout,
            splits=i % 3,
            encoder_leak=(0.0, 0.5)[i % 2],
            head_leak=(0.25, 0.0)[i // 2 % 2],
            poison=(Poison(name, row, column, value),),
        )
        _, tensors = run(kernels, case, direction)
        check_rows(case, tensors, row)
        assert not all(np.isfinite(t.values).all() for t in tensors)


@poisons
@pytest.mark.parametrize("leaks", [(0, 0), (0, 0.5), (0.5, 0), (0.5, 0.5)])
@pytest.mark.parametrize("missing", range(8))
def test_poison_does_not_pass_where_nothing_flows(kernels, missing, leaks, value):
    """A closed leak or a gradient that is not there is no product with 0, which would be NaN."""
    arrives = tuple(not missing >> k & 1 for k in range(3))
    encoder, head = leaks
    shared = {"encoder_leak": encoder, "head_leak": head, "arrives": arrives}
    names = [f"incoming {k}" for k in range(3) if arrives[k]]
    for name in ["feature 0", "feature 1", *names]:
        case = LinearCase(widths=(72, 48), poison=(Poison(name, 5, 3, value),), **shared)
        run(kernels, case, "backward")
    for name in ["condition", "target", "modulation", "film_bias", *names]:
        spot = Poison(name, 0 if "bias" in name else 5, 3, value)
        case = FilmCase(condition_width=72, hidden=48, poison=(spot,), **shared)
        run(kernels, case, "backward")


def test_expanded_features(kernels):
    """Row stride 0: one row seen many times."""
    case = LinearCase(40, (72, 48), 11)
    problem = LinearProblem(kernels, case)
    row = problem.features[0].elements[:1].copy()
    problem.features[0].elements[...] = row
    address, _ = problem.common["feature"][0]
    problem.common["feature"][0] = (address, 0)
    problem.run_forward()
    problem.run_backward()


@directions
@layouts
@small_tiles
def test_linear_rows_without_a_modality(kernels, tile, dtype, layout, direction):
    """What is stored for an absent row, here NaN, is never read into a result."""
    for splits, leak in ((1, 0.0), (3, 0.5)):
        case = LinearCase(
            70, (72, 48, 24), 11, tile=tile, dtype=dtype, layout=layout, splits=splits,
            encoder_leak=leak, head_leak=leak, absent=(0.3, 0.0, 1.0), concat=splits == 1,
        )  # fmt: skip
        _, tensors = run(kernels, case, direction, races=splits == 3)
        assert all(np.isfinite(t.values).all() for t in tensors)


@directions
@layouts
@pytest.mark.parametrize("leak", [0.0, 0.5])
@pytest.mark.parametrize("absent", [(0.3, 0.0), (0.0, 0.3), (1.0, 0.3)])
def test_film_rows_without_a_modality(kernels, absent, leak, layout, direction):
    case = FilmCase(
        70, 72, 48, 11, layout=layout, encoder_leak=leak, head_leak=leak, absent=absent,
        splits=3 if leak else 0,
    )  # fmt: skip
    _, tensors = run(kernels, case, direction, races=leak > 0)
    assert all(np.isfinite(t.values).all() for t in tensors)

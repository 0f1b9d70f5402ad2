"""Plans are pure functions of sizes, alignments, dtype and device: no GPU needed."""

from __future__ import annotations

import pytest
from emulator import harness

pytestmark = pytest.mark.emulator
GRADIENTS = 0x100000  # any aligned address: plans read no memory


@pytest.fixture(scope="module")
def core():
    module = harness.load("emulated_kernels")
    if module is None:
        pytest.skip("the emulator is not built (cmake -S tests/emulator -B build/cpp)")
    return module


def forward(
    core,
    rows,
    width,
    classes,
    dtype="float32",
    tf32=False,
    sms=132,
    address=0,
    executor=None,
    **device,
):
    problem = {
        "rows": rows,
        "classes": classes,
        "width": [width, width],
        "feature": [(address, width)] * 2,
        "weight": [(address, 2 * width)] * 2,
    }
    precision = core.Precision(getattr(core.Dtype, dtype), tf32)
    return core.plan_linear_head_forward(
        problem, precision, core.Device(132, **device), core.PlanRequest(executor=executor)
    )


def backward(core, rows, width, classes, sms=132, **changes):
    problem = {
        "rows": rows,
        "classes": classes,
        "width": [width, width],
        "feature": [(0, width)] * 2,
        "weight": [(0, 2 * width)] * 2,
        "grad_fused": (GRADIENTS, classes),
        "grad_unimodal": [(GRADIENTS, classes)] * 2,
        "grad_feature": [(GRADIENTS, width)] * 2,
        "grad_weight": [(GRADIENTS, 2 * width)] * 2,
        "grad_fused_bias": GRADIENTS,
    } | changes
    return core.plan_linear_head_backward(
        problem,
        core.Precision(core.Dtype.float32),
        core.Device(sms),
        core.PlanRequest(executor=core.Executor.fused),
    )


def test_small_problems_split_k_to_fill_the_device(core):
    plan = forward(core, 64, 512, 34)
    assert plan.launch.tile == core.Tile.float32_small
    assert not plan.direct
    assert plan.launch.cooperative
    assert 4 < plan.launch.grid <= 132
    assert plan.launch.workspace_bytes == sum(plan.splits) * 64 * 40 * 4


def test_larger_problems_run_direct_on_medium_tiles(core):
    plan = forward(core, 2048, 64, 1000, executor=core.Executor.fused)
    assert plan.launch.tile == core.Tile.float32_medium
    assert plan.direct
    assert not plan.launch.cooperative


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_large_heads_take_the_library(core, dtype):
    """From 1.2e9 flop on: 6 x rows x sum of widths x classes."""
    assert forward(core, 256, 512, 309, dtype).launch.executor == core.Executor.fused
    plan = forward(core, 256, 1024, 1000, dtype)
    assert plan.launch.executor == core.Executor.library
    assert not plan.launch.cooperative


def test_old_devices_run_neither(core):
    assert forward(core, 8, 8, 8, capability=75).launch.executor == core.Executor.none


def test_a_tile_that_does_not_fit_is_not_used(core):
    resident = [1] * core.tile_count
    resident[2] = 0  # float32_medium
    plan = forward(core, 2048, 256, 1000, executor=core.Executor.fused, resident_ctas=resident)
    assert plan.launch.tile == core.Tile.float32_small
    assert plan.launch.executor == core.Executor.fused


@pytest.mark.parametrize(("address", "width"), [(4, 512), (0, 509)])
def test_operands_that_are_not_aligned_take_the_exact_small_tile(core, address, width):
    plan = forward(
        core, 2048, width, 1000, tf32=True, address=address, executor=core.Executor.fused
    )
    assert not plan.launch.aligned
    assert plan.launch.tile == core.Tile.float32_small


def test_the_grid_is_bounded(core):
    assert forward(core, 64, 512, 309, max_ctas=7).launch.grid <= 7
    huge = forward(core, 1 << 40, 512, 309, executor=core.Executor.fused)
    assert huge.launch.grid <= 132


def test_closed_leaks_on_aligned_gradients_need_no_workspace(core):
    plan = backward(core, 64, 512, 8)
    assert plan.plane_count == 0
    assert plan.row_splits == 1
    assert plan.launch.workspace_bytes == 0
    assert not plan.launch.cooperative


def test_gradients_that_are_not_aligned_are_copied_once(core):
    assert backward(core, 64, 512, 6).plane_count == 3  # g serves both weights


def test_open_leaks_mix_planes(core):
    assert backward(core, 64, 512, 8, encoder_leak=0.5).plane_count == 2
    assert backward(core, 64, 512, 8, encoder_leak=0.5, head_leak=0.5).plane_count == 4
    only = {"grad_unimodal": [None, None], "encoder_leak": 0.5}
    assert backward(core, 64, 512, 8, **only).plane_count == 0  # a scale is enough


def test_many_rows_split_the_weight_gradient(core):
    plan = backward(core, 200_000, 64, 21)
    assert plan.row_splits > 8
    assert plan.rows_per_split * plan.row_splits >= 200_000


@pytest.mark.parametrize("rows", [64, 200_000])
def test_many_rows_split_the_film_gradients(core, rows):
    problem = {
        "rows": rows,
        "condition_width": 64,
        "hidden": 64,
        "classes": 21,
        **dict.fromkeys(("condition", "target", "film_weight", "out_weight"), (0, 64)),
        "modulation": (0, 128),
        "grad_fused": (GRADIENTS, 24),
        "grad_unimodal": [(GRADIENTS, 24)] * 2,
        **{f"grad_{name}": (GRADIENTS, 64) for name in ("condition", "target")},
        **{f"grad_{name}_weight": (GRADIENTS, 64) for name in ("film", "out")},
        "grad_film_bias": GRADIENTS,
        "grad_out_bias": GRADIENTS,
        "head_leak": 0.5,
    }
    plan = core.plan_film_head_backward(
        problem,
        core.Precision(core.Dtype.float32),
        core.Device(132),
        core.PlanRequest(executor=core.Executor.fused),
    )
    many = rows > 64
    assert (plan.row_splits > 8) == (plan.out_splits > 8) == many
    assert plan.rows_per_split * (plan.row_splits - 1) < rows
    assert plan.rows_per_split * plan.row_splits >= rows
    assert plan.out_rows_per_split * (plan.out_splits - 1) < 3 * rows  # all three branches
    assert plan.out_rows_per_split * plan.out_splits >= 3 * rows


def test_empty_problems_have_a_plan(core):
    assert forward(core, 0, 512, 6).launch.grid >= 1
    assert backward(core, 0, 512, 6).row_splits == 1
    assert backward(core, 4, 0, 6).launch.grid >= 1


def step(core, rows, width, classes, limit=1 << 26, dtype="float32", force=False, **changes):
    problem = {
        "rows": rows,
        "classes": classes,
        "width": [width, width],
        "feature": [(0, width)] * 2,
        "weight": [(0, 2 * width)] * 2,
        "grad_feature": [(GRADIENTS, width)] * 2,
        "grad_weight": [(GRADIENTS, 2 * width)] * 2,
        "grad_fused_bias": GRADIENTS,
        "alpha": [1.0, 1.0],
        "mean": True,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "workspace_limit": limit,
    } | changes
    precision = core.Precision(getattr(core.Dtype, dtype))
    return core.plan_linear_head_step(
        problem,
        precision,
        core.Device(132),
        core.PlanRequest(executor=core.Executor.fused if force else None),
    )


def test_a_small_step_runs_whole_and_splits_k(core):
    plan = step(core, 64, 512, 34)
    assert plan.step.chunk_rows == 64
    assert plan.launch.cooperative
    assert 4 < plan.launch.grid <= 132
    assert sum(plan.forward.splits) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limit", [1, 1 << 20, 1 << 26])
def test_a_large_step_keeps_its_rows_within_the_limit(core, dtype, limit):
    whole = step(core, 16384, 512, 32000, 1 << 40, dtype, force=True)
    assert whole.step.chunk_rows == 16384
    plan = step(core, 16384, 512, 32000, limit, dtype, force=True)
    item = 4 if dtype == "float32" else 2
    per_row = 32000 * (sum(plan.forward.splits) * 4 + plan.step.plane_count * item)
    tile_rows = 64
    assert plan.step.chunk_rows % tile_rows == 0
    assert plan.step.chunk_rows == tile_rows or plan.step.chunk_rows * per_row <= limit
    # chunks add up in the output, unless that is narrower than float32
    assert plan.backward.partials == (dtype == "bfloat16")


def test_planes_of_a_step(core):
    assert step(core, 64, 512, 8).step.plane_count == 3
    assert not step(core, 64, 512, 8).step.mixed
    leaks = {"encoder_leak": 0.5, "head_leak": 0.5}
    assert step(core, 64, 512, 8, **leaks).step.plane_count == 5  # per encoder, head, and bias
    assert step(core, 64, 512, 8, encoder_leak=0.5).step.plane_count == 3
    nothing = {"grad_feature": [None] * 2, "grad_weight": [None] * 2, "grad_fused_bias": 0}
    plan = step(core, 64, 512, 8, **nothing, **leaks)
    assert plan.step.plane_count == 0
    assert not plan.step.gradients
    features_only = nothing | {"grad_feature": [(GRADIENTS, 512)] * 2}
    assert step(core, 64, 512, 8, **features_only).step.plane_count == 2


def test_large_steps_take_the_library_and_chunks_of_rows_that_it_is_efficient_on(core):
    plan = step(core, 1024, 2048, 1000)
    assert plan.launch.executor == core.Executor.library
    assert plan.step.chunk_rows == 1024
    by_default = step(core, 16384, 1024, 32000, limit=0, dtype="bfloat16")
    assert 1024 <= by_default.step.chunk_rows < 4096
    by_user = step(core, 16384, 1024, 32000, limit=64 << 20, dtype="bfloat16")
    assert by_user.step.chunk_rows < 1024
    assert by_user.launch.workspace_bytes < by_default.launch.workspace_bytes


def test_empty_steps_have_a_plan(core):
    for rows, width, classes in ((0, 512, 6), (4, 0, 6)):
        plan = step(core, rows, width, classes)
        assert plan.launch.grid >= 1
        assert plan.step.chunk_rows >= 1

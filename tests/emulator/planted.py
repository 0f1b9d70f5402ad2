"""Defects to plant, one at a time, in a copy of the sources: the kernels carry no test code.

Each is a text of one file, what to put in its place, and a pattern that one of the reports must
match. A text that no longer occurs is an error, so the list cannot rot silently.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    text: str
    instead: str
    report: str


TILE, LOADER, PHASES = (
    "cuda/kernels/gemm_tile.cuh",
    "cuda/kernels/tile_loader.cuh",
    "cuda/kernels/phases.cuh",
)
FORWARD, BACKWARD = "cuda/kernels/linear_forward.cuh", "cuda/kernels/linear_backward.cuh"
GRADIENTS, FILM_GRADIENTS = "cuda/kernels/linear_gradients.cuh", "cuda/kernels/film_gradients.cuh"
SUMS = "cuda/kernels/row_sums.cuh"
LINEAR_STEP, FILM_STEP = "cuda/kernels/linear_step.cuh", "cuda/kernels/film_step.cuh"
LOSSES, ROWS = "cuda/kernels/cross_entropy.cuh", "cuda/kernels/rows.cuh"
COUNTS = "cuda/kernels/step_counts.cuh"
LINEAR_LIBRARY, FILM_LIBRARY = "cuda/library/linear_library.cu", "cuda/library/film_library.cu"
LIBRARY, MATMUL = "cuda/library/library.cuh", "cuda/library/matmul.cpp"
PLAN_LINEAR = "cuda/plan/plan_linear.cpp"
REFUSED = r"invalid value|not supported|memory fault|out of bounds"
FILM_FORWARD, FILM_BACKWARD = "cuda/kernels/film_forward.cuh", "cuda/kernels/film_backward.cuh"
RACE = r"race on shared memory of block \d+|read of uninitialised shared memory"
WRONG = r"\d+ of \d+ elements wrong"
GRID_RACE = r"race on|read of uninitialised|elements wrong"

BUGS = [
    Bug(
        "no barrier in the main loop", TILE,
        "__syncthreads();  // stage `read` has landed", "// stage `read` has landed", RACE,
    ),
    Bug(
        "no barrier after the main loop", TILE,
        "    __syncthreads();  // every copy", "    // every copy", RACE,
    ),
    Bug(
        "no barrier in the epilogue", TILE,
        "    spill(out);\n    __syncthreads();", "    spill(out);", RACE,
    ),
    Bug(
        "no barrier after the epilogue", TILE,
        "kRun)));\n    }\n    __syncthreads();", "kRun)));\n    }", RACE,
    ),
    Bug(
        "no barrier in a column sum", PHASES,
        "kRun + e] = sum[e];\n  __syncthreads();", "kRun + e] = sum[e];",
        r"race on shared memory|elements wrong",
    ),
    Bug(
        "barrier inside a divergent branch", PHASES,
        "kRun + e] = sum[e];\n", "kRun + e] = sum[e];\n  if (count > 0)\n",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "early exit before a barrier", PHASES,
        "  double sum[kRun] = {};\n  if (count > 0) {",
        "  double sum[kRun] = {};\n  if (count <= 0) return;\n  if (count > 0) {",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "no cp.async wait", TILE,
        "      copy_async_wait<C::kStages - 2>();\n", "", WRONG + "|in flight",
    ),
    Bug("cp.async wait one group too lax", TILE, "<C::kStages - 2>", "<C::kStages - 1>",
        WRONG + "|in flight"),
    Bug(
        "one row too many, 16-byte copies", LOADER,
        "row + r < rows && bytes > 0", "row + r <= rows && bytes > 0",
        r"memory fault|out of bounds",
    ),
    Bug(
        "one row too few, 16-byte copies", LOADER,
        "row + r < rows && bytes > 0", "row + r + 1 < rows && bytes > 0", WRONG,
    ),
    Bug(
        "one column too many, 16-byte copies", LOADER,
        "inside = columns - column;", "inside = columns - column + 1;", WRONG + "|memory fault",
    ),
    Bug(
        "one column too many, element copies", LOADER,
        "r < rows && c < columns;", "r < rows && c <= columns;", WRONG + "|memory fault",
    ),
    Bug(
        "one row too many, 16-bit elements", LOADER,
        "r < rows && c < columns ?", "r <= rows && c < columns ?", WRONG + "|memory fault",
    ),
    Bug(
        "no zero fill, 16-byte copies", LOADER,
        "      copy_async<16>(", "      if (exists) copy_async<16>(", WRONG + "|uninitialised",
    ),
    Bug(
        "no zero fill, element copies", LOADER,
        "      copy_async<sizeof(T)>(", "      if (exists) copy_async<sizeof(T)>(",
        WRONG + "|uninitialised",
    ),
    Bug(
        "store one column too far", TILE,
        "if (e < count) to[e]", "if (e <= count) to[e]", r"stray write|memory fault|out of bounds",
    ),
    Bug(
        "store one row too far", TILE,
        "const int rows = int(smaller(m_end - m0, C::kRows));\n    const int columns",
        "const int rows = int(smaller(m_end - m0 + 1, C::kRows));\n    const int columns",
        r"stray write|memory fault|out of bounds",
    ),
    Bug(
        "no grid sync before the logits", FORWARD,
        "    grid_sync();\n    write_logits", "    write_logits", GRID_RACE,
    ),
    Bug(
        "no grid sync after the planes", BACKWARD,
        "      Gradients::copy_masked(args, all);\n      grid_sync();",
        "      Gradients::copy_masked(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding row splits", BACKWARD,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "no grid sync before the modulation", FILM_FORWARD,
        "    grid_sync();\n    modulate", "    modulate", GRID_RACE,
    ),
    Bug(
        "no grid sync after the modulation", FILM_FORWARD,
        "    modulate(args, all);\n    grid_sync();", "    modulate(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before the film logits", FILM_FORWARD,
        "    grid_sync();\n    write_logits", "    write_logits", GRID_RACE,
    ),
    Bug(
        "no grid sync after prepare", FILM_BACKWARD,
        "    Gradients::prepare_features(args, all);\n    grid_sync();",
        "    Gradients::prepare_features(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before combine", FILM_BACKWARD,
        "    grid_sync();\n    Gradients::combine", "    Gradients::combine", GRID_RACE,
    ),
    Bug(
        "no grid sync after combine", FILM_BACKWARD,
        "    Gradients::combine(args, all);\n    grid_sync();",
        "    Gradients::combine(args, all);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding film row splits", FILM_BACKWARD,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "a weight's row split is left out", SUMS,
        "column, splits, plane, count, v);", "column, splits - 1, plane, count, v);", WRONG,
    ),
    Bug(
        "idle CTAs leave before the grid sync", FORWARD,
        "    if (args.plan.direct) return;\n    grid_sync();",
        "    if (args.plan.direct || blockIdx.x == 0) return;\n    grid_sync();",
        r"barrier divergence|deadlock",
    ),
    Bug(
        "alignment not looked at", "cuda/plan/planning.h",
        "(data) % 16 == 0 && stride * element_size(dtype) % 16 == 0;",
        "(data) + stride + element_size(dtype) > 0;", r"misaligned",
    ),
    Bug("wrong fragment of B", TILE, "l / 8 % 2 * kRowElements", "l / 16 * kRowElements", WRONG),
    Bug(
        "encoder leak applied to the head", GRADIENTS,
        "leak = p.leaks.head;", "leak = p.leaks.encoder;", WRONG,
    ),
    Bug(
        "a closed modulation", FILM_GRADIENTS,
        "v[e] = encoder * fused[e] * y[e];", "v[e] = encoder * fused[e];", WRONG,
    ),
    Bug(
        "a closed leak is a product with 0", GRADIENTS,
        "      if (leak == 0) return;\n", "", r"grad_bias 0: 1 of 11 elements wrong.*got nan",
    ),
    Bug(
        "a branch without a gradient is a product with 0", FILM_GRADIENTS,
        "    if (half == 0 && !args.plan.need_branch[0]) summed.count = 0;\n", "",
        r"grad_film_weight: 72 of 6912 elements wrong.*got nan",
    ),
    Bug(
        "no barrier in the count of rows", COUNTS,
        "of_warp[threadIdx.x] = mine;\n    __syncthreads();", "of_warp[threadIdx.x] = mine;",
        RACE + "|" + WRONG,
    ),
    Bug(
        "no barrier before threads' losses are added", COUNTS,
        "of_thread[threadIdx.x] = {sums.loss, sums.correct};\n    __syncthreads();",
        "of_thread[threadIdx.x] = {sums.loss, sums.correct};", RACE + "|" + WRONG,
    ),
    Bug(
        "no grid sync before the rows of a step", LINEAR_STEP,
        "      grid_sync();\n      hide_origin(rows.begin);", "      hide_origin(rows.begin);",
        GRID_RACE,
    ),
    Bug(
        "no grid sync after the rows, nor between chunks", LINEAR_STEP,
        "      Gradients::copy_masked(args.backward, rows);\n      grid_sync();",
        "      Gradients::copy_masked(args.backward, rows);", GRID_RACE,
    ),
    Bug(
        "no grid sync before adding a step's sums", LINEAR_STEP,
        "      grid_sync();\n      Gradients::add_row_splits", "      Gradients::add_row_splits",
        GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's modulation", FILM_STEP,
        "      grid_sync();\n      Forward::modulate", "      Forward::modulate", GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's film logits", FILM_STEP,
        "      grid_sync();\n      Forward::template", "      Forward::template", GRID_RACE,
    ),
    Bug(
        "no grid sync before the rows of a film step", FILM_STEP,
        "      grid_sync();\n      hide_origin(rows.begin);", "      hide_origin(rows.begin);",
        GRID_RACE,
    ),
    Bug(
        "no grid sync before a step's combine", FILM_STEP,
        "        grid_sync();\n        Gradients::combine", "        Gradients::combine", GRID_RACE,
    ),
    Bug(
        "no grid sync after a step's combine", FILM_STEP,
        "        grid_sync();\n        Gradients::run_film", "        Gradients::run_film",
        GRID_RACE,
    ),
    Bug(
        "the residual lacks the target", LOSSES,
        "t[e] = column + e == row.target ? share + rest : rest;", "t[e] = rest;", WRONG,
    ),
    Bug(
        "smoothing takes the target's own share away", COUNTS,
        "weights.target = 1 - step.loss.label_smoothing;", "weights.target = 1;", WRONG,
    ),
    Bug(
        "the last of equal maxima is the prediction", "cuda/kernels/peak.cuh",
        "(!beats(largest, other) && column < best)", "(!beats(largest, other) && column > best)",
        WRONG,
    ),
    Bug(
        "absent rows count", COUNTS,
        "(k == 0 || !is_absent(step.present[k - 1], row))", "true", WRONG,
    ),
    Bug(
        "unmixed planes are weighted", LOSSES,
        "if (step.plan.mixed) weight *=", "weight *=", WRONG,
    ),
    Bug(
        "losses of earlier chunks are forgotten", COUNTS,
        "if (rows.begin > 0) {", "if (rows.begin < 0) {", WRONG,
    ),
    Bug(
        "sums of earlier chunks are forgotten", SUMS,
        "if (kStep && rows.begin > 0) add_stored", "if (kStep && rows.begin < 0) add_stored", WRONG,
    ),
    Bug(
        "features of absent rows reach the weights", PHASES,
        "read_run(from.data + row * from.stride + column, absent ? 0 : count, v)",
        "read_run(from.data + row * from.stride + column, count, v)", WRONG,
    ),
    Bug(
        "absent rows get the leak's gradient", SUMS,
        "v[e] = absent ? Accumulator(0) : v[e] * to.scale;", "v[e] *= to.scale;", WRONG,
    ),
    Bug(
        "an absent modality takes part in the fused logits", ROWS,
        "if (taken >> i & 1) add_part", "add_part", WRONG,
    ),
    Bug(
        "an absent y is read", FILM_FORWARD,
        "is_absent(head.present[1], row) ? 0 : count, v", "count, v", WRONG,
    ),
    Bug(
        "every branch is scaled like the fused one", PLAN_LINEAR,
        "const int branch = step.mixed ? 0 : i + 1;", "const int branch = 0;", WRONG,
    ),
    # ---- rows in one pass
    Bug(
        "a split plane is left out", ROWS,
        "s < splits; s += int64_t(replicas)", "s + 1 < splits; s += int64_t(replicas)", WRONG,
    ),
    Bug(
        "the lanes' split planes are not added", ROWS,
        "int mask = lanes_; mask < 32; mask *= 2", "int mask = 32; mask < 32; mask *= 2", WRONG,
    ),
    Bug(
        "no order between a warp's peaks and their readers", LOSSES,
        "      warp_sync();\n", "", GRID_RACE,
    ),
    Bug(
        "no barrier between the warps' peaks and their readers", LOSSES,
        "    } else {\n      __syncthreads();\n    }\n    const int k", "    }\n    const int k",
        GRID_RACE,
    ),
    Bug("weights: rows have none", COUNTS, "sample_weight(step, row) *", "1 *", WRONG),
    Bug(
        "weights: the target's class has none", COUNTS,
        "return weights && step.loss.target ? weights[target]",
        "return false ? weights[target]", WRONG,
    ),
    Bug(
        "weights: residuals have none", LOSSES,
        "? board.weights.row * Base::sample_weight(step, rows.begin + row.index)",
        "? Accumulator(1)",
        WRONG,
    ),
    Bug(
        "weights: a mean divides by rows", COUNTS,
        "loss /= counted.divisor", "loss /= double(counted.rows)", WRONG,
    ),
    Bug(
        "weights: classes of a soft target have none", LOSSES,
        "for (int e = 0; e < kRun; ++e) t[e] *= w[e];", "", WRONG,
    ),
    Bug(
        "a soft target adds up to one", LOSSES,
        "Accumulator(wanted_of_row(board, parity, k, logits.by_warp()).mass)", "Accumulator(1)",
        WRONG,
    ),
    Bug(
        "a soft target's columns are those of the first run", LOSSES,
        "row, logits.column(r), logits.count(r), v", "row, 0, logits.count(r), v",
        WRONG + "|out of bounds",
    ),
    Bug(
        "a soft target's likeliest class is that of the last warp", LOSSES,
        "peak_of_row(board, parity, kMaxBranches, logits.by_warp()).best",
        "board.peaks[parity][kMaxBranches][C::kWarps - 1].best", "correct",
    ),
    Bug(
        "predictions are of the chunk", LOSSES,
        "to = k * step.rows + at;", "to = k * step.rows + row.index;",
        WRONG + "|predictions",
    ),
    Bug("one board for all rows", LOSSES, "      parity ^= 1;\n", "", r"race on shared memory"),
    Bug(
        "the warp's own maximum is forgotten", LOSSES,
        "once ? exponential(own - peak.largest) : 1", "1", WRONG,
    ),
    Bug(
        "the second sweep takes what is there for a softmax", LOSSES,
        "(once ? z : exponential(z - peak.largest))", "z", WRONG,
    ),
    Bug(
        "blocks of columns do not add up", LOSSES,
        "    if (first) {\n      kept = peak;", "    if (true) {\n      kept = peak;",
        WRONG,
    ),
    Bug(
        "a run is longer than the row", PHASES,
        "int(smaller(columns - run * kRun, kRun))", "kRun",
        r"stray write|memory fault|out of bounds|elements wrong|uninitialised",
    ),
    Bug(
        "a lane of a column sum is left out", PHASES,
        "for (int l = 1; l < lanes; ++l) all", "for (int l = 2; l < lanes; ++l) all", WRONG,
    ),
    Bug(
        "a bias split is left out", SUMS,
        "{0, splits}, columns, item", "{0, splits - 1}, columns, item", WRONG,
    ),
    # ---- the library executor
    Bug(
        "library: absent rows keep a leak's gradient", PHASES,
        "if (is_absent(present, row)) write_run", "if (false) write_run",
        WRONG + "|gradient of an absent row",
    ),
    Bug(
        "library: biases of earlier chunks are forgotten", SUMS,
        "*to = kStep && rows.begin > 0 ? *to + sum : sum;", "*to = sum;", WRONG,
    ),
    Bug(
        "library: the constants of products are not written", COUNTS,
        "lane == 0 ? 1.f : 0.f}", "0.f}", WRONG,
    ),
    Bug(
        "library: one scale for branches whose alphas differ", LIBRARY,
        "shared &= loss.alpha[k - 1] == loss.alpha[0]", "shared &= true", WRONG,
    ),
    Bug(
        "library: a branch of FiLM lies elsewhere", FILM_LIBRARY,
        "k * plan.plane_rows * plan.padded_hidden, product.result",
        "k * rows.count * plan.padded_hidden, product.result", WRONG + "|uninitialised",
    ),
    Bug(
        "operands are not swapped", MATMUL,
        "p.b.data, type,\n                          lead_b, p.a.data, type, lead_a, keep",
        "p.a.data, type,\n                          lead_a, p.b.data, type, lead_b, keep",
        WRONG + "|" + REFUSED,
    ),
    Bug(
        "a leading dimension is the number of columns", MATMUL,
        ": leading(p.b.stride, p.depth, p.columns);", ": std::max<int64_t>(p.columns, 1);", WRONG,
    ),
    Bug(
        "beta is forgotten", MATMUL, "p.accumulate ? constants : constants + 1", "constants + 1",
        WRONG,
    ),
    Bug(
        "the second modality lies elsewhere", MATMUL,
        "lead_b, step.b, p.a.data", "lead_b, 0, p.a.data", WRONG,
    ),
    Bug(
        "the second modality's operand a lies elsewhere", MATMUL,
        "lead_a,\n                                      step.a, keep",
        "lead_a,\n                                      0, keep", WRONG,
    ),
    Bug(
        "the second modality's result lies elsewhere", MATMUL, "lead_c, step.c, count",
        "lead_c, 0, count", WRONG + "|uninitialised",
    ),
    Bug(
        "the result's leading dimension is its number of columns", MATMUL,
        "leading(p.c.stride, p.rows, p.columns)", "std::max<int64_t>(p.columns, 1)",
        WRONG + "|stray write|uninitialised",
    ),
    Bug("a scale on the device is not read", MATMUL, "  if (p.scale) {\n    const StepTotals",
        "  if (false) {\n    const StepTotals", WRONG + "|memory fault"),
    Bug(
        "products at unequal distances run together", MATMUL,
        "precision.dtype) == step &&", "precision.dtype).a >= 0 &&",
        WRONG + "|" + REFUSED + "|uninitialised",
    ),
    Bug(
        "a pair that descends does not start at its other end", MATMUL,
        "first = &products[i + 1];", "", WRONG + "|" + REFUSED + "|stray write",
    ),
    Bug(
        "a pair that descends is two calls", MATMUL,
        "back.b >= 0 && back.c > 0", "false", "launches for two equal widths",
    ),
    Bug(
        "features that do not lie in order are not copied", PLAN_LINEAR,
        "head.feature[1].data < head.feature[0].data &&", "false &&",
        "launches for two equal widths",
    ),
    Bug(
        "an empty product is left as it was", MATMUL, "if (!p.accumulate) {", "if (false) {",
        WRONG + "|uninitialised",
    ),
]  # fmt: skip
BY_NAME = {bug.name: bug for bug in BUGS}
# The control, and one of each sort: what every run of the tests can afford.
SHORT_LIST = [
    "no barrier in the main loop",
    "no cp.async wait",
    "one row too many, 16-byte copies",
    "no grid sync before the logits",
    "no grid sync after the rows, nor between chunks",
    "one board for all rows",
    "beta is forgotten",
]

"""The CUDA kernels on a GPU: their values, and how they behave towards streams, graphs and hosts.

Truth is the reference in float64 on the CPU, so no library of the GPU's takes part in it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import pytest
import torch
from support.problems import (
    LAYOUTS,
    Problem,
    assert_same,
    assert_two_references,
    flat,
    gradients,
    make_problem,
    random_tensor,
)
from torch import Tensor

import dgl_ext
from dgl_ext._arguments.heads import HEADS
from dgl_ext._ops import extension as _extension


def reason_to_skip() -> str:
    """Why nothing here can run, or nothing."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if not _extension.available("cuda"):
        return f"the CUDA kernels are not loaded: {_extension.error('cuda')}"
    return ""


_REASON = reason_to_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_REASON), reason=_REASON)]

DEVICE = "cuda"
KERNELS = "fused"  # the backend that takes this project's kernels at any size
BACKENDS = (KERNELS, "library")  # both executors; "auto" is one of them
LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *LOW_DTYPES)
ALIGNED = {"leading": (96,), "widths": (64, 64), "classes": 32}
RAGGED = {"leading": (37,), "widths": (29, 23), "classes": 11}
LARGEST = {"leading": (300,), "widths": (264, 392), "classes": 309}
LARGER = {"leading": (256,), "widths": (256, 384), "classes": 128}
SIZES = [pytest.param(ALIGNED, id="aligned"), pytest.param(RAGGED, id="ragged")]
LEAKS = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (1.0, 1.0)]

backends = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
heads = pytest.mark.parametrize("head", list(HEADS))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("size", SIZES)


@contextlib.contextmanager
def float32_products(precision: str):
    """Whether float32 products on CUDA are "ieee" or may be "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def exact_products():
    """No tf32 unless a test asks for it."""
    with float32_products("ieee"):
        yield


def on_device(tensor: Tensor, device: str | torch.device = DEVICE) -> Tensor:
    """A copy there with the same strides; `Tensor.to` would lay out sliced ones anew."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((count,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def evaluate(
    problem: Problem,
    backend: str,
    cotangents: Sequence[Tensor | None],
    **leaks: float,
) -> dict[str, Tensor | None]:
    """Logits and all gradients, taken to the CPU; the cotangents come from there."""
    logits = problem.call(dgl_ext.fused_decouple, backend=backend, **leaks)
    moved = [
        None if g is None else on_device(g, z.device).to(z.dtype)
        for g, z in zip(cotangents, flat(logits), strict=True)
    ]
    found = {f"logits[{i}]": z.detach() for i, z in enumerate(flat(logits))}
    found |= gradients(logits, problem, moved)
    return {name: None if t is None else t.cpu() for name, t in found.items()}


def draw_cotangents(problem: Problem, layout: str = "contiguous") -> list[Tensor]:
    like = problem.features[0]
    shape = (*like.shape[:-1], problem.weights[-1].shape[0])
    generator = torch.Generator().manual_seed(1)
    return [
        random_tensor(shape, generator, dtype=like.dtype, layout=layout)
        for _ in range(1 + len(problem.features))
    ]


def check(backend: str, problem: Problem, cotangents=None, **leaks: float) -> None:
    """A float64 problem on the device against the reference on the CPU."""
    cotangents = draw_cotangents(problem) if cotangents is None else cotangents
    expected = evaluate(problem, "reference", cotangents, **leaks)
    assert_same(evaluate(problem.map(on_device), backend, cotangents, **leaks), expected)


# --- values ---


@backends
@pytest.mark.parametrize("leading", [(), (0,), (1,), (3, 7), (33,), (257,)], ids=str)
@pytest.mark.parametrize("classes", [1, 6, 70])
@heads
def test_float64_for_every_shape(head, backend, leading, classes):
    check(backend, make_problem(head, leading=leading, widths=(37, 18), classes=classes))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(34,), (3, 5), (2, 3, 4)], ids=str)
@heads
def test_float64_for_every_layout(head, backend, layout, leading):
    problem = make_problem(head, layout=layout, leading=leading, widths=(24, 17), classes=12)
    check(backend, problem, draw_cotangents(problem, layout))


def heads_and_modalities() -> list[tuple[str, int]]:
    return [(name, n) for name, head in HEADS.items() for n in (1, 2, 3, 8) if n in head.modalities]


@backends
@pytest.mark.parametrize(("head", "count"), heads_and_modalities())
def test_float64_for_every_number_of_modalities(head, backend, count):
    check(backend, make_problem(head, widths=(9, 16, 1, 40, 7, 8, 3, 33)[:count], leading=(19,)))


@backends
@pytest.mark.parametrize("leaks", LEAKS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@heads
def test_float64_with_leaks_and_without_biases(head, backend, leaks, bias):
    problem = make_problem(head, bias=bias, **RAGGED)
    check(backend, problem, encoder_leak=leaks[0], head_leak=leaks[1])


@backends
@pytest.mark.parametrize("leaks", LEAKS, ids=str)
@heads
def test_every_subset_of_losses(head, backend, leaks):
    problem = make_problem(head, leading=(5,), widths=(6, 9), classes=4)
    cotangents = draw_cotangents(problem)
    for used in itertools.product((False, True), repeat=3):
        kept = [g if use else None for g, use in zip(cotangents, used, strict=True)]
        check(backend, problem, kept, encoder_leak=leaks[0], head_leak=leaks[1])


@backends
@pytest.mark.parametrize("leaks", LEAKS, ids=str)
@heads
def test_every_subset_of_requires_grad(head, backend, leaks):
    problem = make_problem(head, leading=(5,), widths=(6, 9), classes=4)
    tensors = [tensor for _, tensor in problem.named()]
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        check(backend, problem, encoder_leak=leaks[0], head_leak=leaks[1])


def check_two_references(backend: str, problem: Problem, **leaks: float) -> None:
    """No worse than plain PyTorch on the same device in the same dtype."""
    cotangents = draw_cotangents(problem)
    truth = evaluate(problem.to(torch.float64), "reference", cotangents, **leaks)
    moved = problem.map(on_device)
    composition = evaluate(moved, "reference", cotangents, **leaks)
    assert_two_references(evaluate(moved, backend, cotangents, **leaks), composition, truth)


def check_other_dtype(backend: str, problem: Problem, **leaks: float) -> None:
    """float32 within what its roundings allow, 16 bits no worse than plain PyTorch.

    Our sums run over k in another order than the library's. Each order is off by about as much, and
    which of the two by more is chance: a bound from the other's error failed 8 tests of 1,745 on an
    H200, by 2 to 29 %. In 16 bits one rounding of the result outweighs what the order does.
    """
    if problem.features[0].dtype != torch.float32:
        check_two_references(backend, problem, **leaks)
        return
    pytest.importorskip("numpy")
    import gpu_bounds

    cotangents = draw_cotangents(problem)
    truth = evaluate(problem.to(torch.float64), "reference", cotangents, **leaks)
    found = evaluate(problem.map(on_device), backend, cotangents, **leaks)
    shares = leaks.get("encoder_leak", 0.0), leaks.get("head_leak", 0.0)
    gpu_bounds.assert_within(found, truth, gpu_bounds.expected(problem, cotangents, *shares))


@backends
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@sizes
@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@heads
def test_other_dtypes_are_no_worse_than_pytorch(head, backend, dtype, size, leaks):
    problem = make_problem(head, dtype=dtype, **size)
    check_other_dtype(backend, problem, encoder_leak=leaks[0], head_leak=leaks[1])


@every_backend
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@heads
def test_other_dtypes_at_a_larger_size(head, backend, dtype):
    """Several tiles in every direction, with ragged ends."""
    problem = make_problem(head, dtype=dtype, **LARGEST)
    check_other_dtype(backend, problem)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@heads
def test_other_dtypes_in_every_layout(head, dtype, layout):
    problem = make_problem(head, dtype=dtype, layout=layout, **RAGGED)
    check_other_dtype(KERNELS, problem)


@backends
@heads
def test_tf32_is_no_worse_than_pytorch_with_tf32(head, backend):
    with float32_products("tf32"):
        check_two_references(backend, make_problem(head, dtype=torch.float32, **LARGER))


@heads
def test_tf32_only_where_torch_allows_it(head):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with tf32")
    problem = make_problem(head, dtype=torch.float32, **LARGER).map(on_device)
    cotangents = draw_cotangents(problem)
    results = []
    for precision in ("ieee", "tf32", "ieee"):
        with float32_products(precision):
            results.append(evaluate(problem, KERNELS, cotangents))
    assert_bitwise(results[0], results[2])
    assert not torch.equal(results[0]["logits[0]"], results[1]["logits[0]"])


def assert_bitwise(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        found = actual[name]
        assert (found is None) == (tensor is None), name
        assert tensor is None or torch.equal(found, tensor), name


@sizes
@dtypes
@heads
def test_same_input_gives_same_bits(head, dtype, size):
    problem = make_problem(head, dtype=dtype, **size).map(on_device)
    cotangents = draw_cotangents(problem)
    first = evaluate(problem, KERNELS, cotangents, encoder_leak=0.5, head_leak=0.25)
    for _ in range(4):
        again = evaluate(problem, KERNELS, cotangents, encoder_leak=0.5, head_leak=0.25)
        assert_bitwise(again, first)


@heads
def test_autocast_computes_in_the_lower_dtype(head):
    problem = make_problem(head, dtype=torch.float32, **ALIGNED).map(on_device)
    cotangents = [g.bfloat16() for g in draw_cotangents(problem)]
    expected = evaluate(problem.to(torch.bfloat16), KERNELS, cotangents)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = evaluate(problem, KERNELS, cotangents)
    assert found["logits[0]"].dtype == torch.bfloat16
    assert found["weight[0]"].dtype == torch.float32
    assert_bitwise(found, {name: t.to(found[name].dtype) for name, t in expected.items()})


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@heads
def test_compiles_into_one_graph(head, leaks):
    torch._dynamo.reset()
    problem = make_problem(head, dtype=torch.float32, **RAGGED).map(on_device)
    cotangents = [on_device(g) for g in draw_cotangents(problem)]

    def call():
        return problem.call(
            dgl_ext.fused_decouple, backend=KERNELS, encoder_leak=leaks[0], head_leak=leaks[1]
        )

    compiled, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(), call()
    for a, b in zip(flat(compiled), flat(eager), strict=True):
        assert torch.equal(a, b)
    assert_bitwise(gradients(compiled, problem, cotangents), gradients(eager, problem, cotangents))


@pytest.mark.parametrize("position", ["feature", "weight", "bias"])
def test_a_raw_op_refuses_tensors_of_two_devices(position):
    problem = make_problem("sum", dtype=torch.float32, requires_grad=False)
    groups = {"feature": problem.features, "weight": problem.weights, "bias": problem.biases}
    moved = [
        [
            tensor if (name, i) == (position, 1) else on_device(tensor)
            for i, tensor in enumerate(tensors)
        ]
        for name, tensors in groups.items()
    ]
    plural = {"feature": "features", "weight": "weights", "bias": "biases"}[position]
    with pytest.raises(RuntimeError, match=rf"linear_head_forward: {plural}\[1\]: expected"):
        torch.ops.dgl_ext.linear_head_forward.default(*moved, [])


def test_the_function_names_the_device_that_does_not_fit():
    problem = make_problem("concat", dtype=torch.float32)
    problem.features = tuple(on_device(h.detach()) for h in problem.features)
    with pytest.raises(ValueError, match=r"weight: expected device cuda:0 as features\[0\], got"):
        problem.call(dgl_ext.fused_decouple)

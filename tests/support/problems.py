"""What the tests and benchmarks share: random problems, their gradients, and ways to compare.

Everything is drawn, cotangents included: on zeros or under `.sum().backward()` too many wrong
gradients look right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgl_ext._arguments.heads import get_head
from dgl_ext.types import DecoupledLogits, DecoupledLoss

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
# Under the emulator (tests/emulator/run_ops_tests.py) CUDA's second executor runs on the CPU too.
COMPILED_BACKENDS = ("fused", "library") if os.environ.get("DGL_EXT_EMULATED") else ("fused",)
BACKENDS = ("reference", *COMPILED_BACKENDS)


def random_tensor(
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> Tensor:
    """Draws a CPU tensor from a normal distribution, laid out in memory as `layout` says.

    - contiguous: row-major;
    - transposed: the last two dimensions swapped in memory (a 1-D tensor: every second element);
    - sliced: every second row and column of a larger buffer;
    - expanded: the first dimension of a matrix has stride 0, so that its rows are all the same.
    """

    def draw(*sizes: int) -> Tensor:
        drawn = torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale
        return drawn.to(dtype)

    shape = tuple(shape)
    if layout == "transposed" and len(shape) > 1:
        return draw(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "expanded" and len(shape) > 1:
        return draw(1, *shape[1:]).expand(shape)
    if layout in ("transposed", "sliced") and shape:
        steps = (slice(None, None, 2),) * len(shape)
        return draw(*(2 * size for size in shape))[steps]
    return draw(*shape)


@dataclass
class Problem:
    """Arguments for `fused_decouple`, drawn at random."""

    fusion: str
    features: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @property
    def weight(self) -> Any:
        """The `weight` argument."""
        return self.weights[0] if get_head(self.fusion).single_weight else self.weights

    @property
    def bias(self) -> Any:
        """The `bias` argument."""
        return self.biases[0] if get_head(self.fusion).single_weight else self.biases

    def call(self, function: Any, **options: Any) -> DecoupledLogits:
        """Calls `function`, which has the signature of `fused_decouple`."""
        logits: DecoupledLogits = function(
            self.features, self.weight, self.bias, fusion=self.fusion, **options
        )
        return logits

    def step(self, function: Any, target: Tensor, **options: Any) -> DecoupledLoss:
        """Calls `function`, which has the signature of `fused_decouple_cross_entropy`."""
        loss: DecoupledLoss = function(
            self.features, self.weight, target, bias=self.bias, fusion=self.fusion, **options
        )
        return loss

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors there are, by name."""
        groups = {"features": self.features, "weight": self.weights, "bias": self.biases}
        for name, tensors in groups.items():
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    yield f"{name}[{i}]", tensor

    def to(self, *args: Any) -> Problem:
        """A copy on fresh leaves of another dtype or device, with the same requires_grad."""
        return self.map(lambda tensor: tensor.to(*args))

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """A copy on fresh leaves that `function` makes, with the same requires_grad."""

        def convert(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return function(tensor.detach()).requires_grad_(tensor.requires_grad)

        groups = [tuple(map(convert, g)) for g in (self.features, self.weights, self.biases)]
        return Problem(self.fusion, *groups)  # type: ignore[arg-type]


def make_problem(
    fusion: str,
    *,
    leading: Sequence[int] = (7,),
    widths: Sequence[int] = (5, 4),
    classes: int = 3,
    bias: bool | Sequence[bool] = True,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
) -> Problem:
    """Draws features and parameters of a head; weights are scaled to keep logits near 1.

    Args:
        fusion: the head.
        leading: the features' leading shape.
        widths: one width per modality.
        classes: C, the number of outputs.
        bias: whether there are biases, or for each one whether it is there.
        dtype: of all tensors.
        layout: of all tensors, see `random_tensor`; weights and biases are never expanded.
        requires_grad: of all tensors.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (classes if rows is None else rows, columns or 0)
        for rows, columns in get_head(fusion).weight_shapes(list(widths))
    ]
    there = [bias] * len(shapes) if isinstance(bias, bool) else list(bias)

    def leaf(shape: Sequence[int], layout: str, scale: float = 1.0) -> Tensor:
        tensor = random_tensor(shape, generator, dtype=dtype, layout=layout, scale=scale)
        return tensor.detach().requires_grad_(requires_grad)

    of_parameters = "contiguous" if layout == "expanded" else layout
    return Problem(
        fusion,
        tuple(leaf((*leading, width), layout) for width in widths),
        tuple(leaf(shape, of_parameters, max(1, shape[1]) ** -0.5) for shape in shapes),
        tuple(
            leaf(shape[:1], of_parameters) if has else None
            for shape, has in zip(shapes, there, strict=True)
        ),
    )


def head_arguments(module: Any) -> tuple[Any, Any]:
    """The `weight` and `bias` of the function that a head of `dgl_ext.nn` calls."""
    layers = module._layers()
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return (weights[0], biases[0]) if get_head(module.fusion).single_weight else (weights, biases)


def flat(logits: DecoupledLogits) -> tuple[Tensor, ...]:
    """All logits, fused first."""
    return (logits.fused, *logits.unimodal)


def each_output(*criteria: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """A `loss_fn` for diagnostics: one criterion for all outputs of a head, or one for each."""

    def loss_fn(head: Any, features: Sequence[Tensor]) -> dict[str, Tensor]:
        outputs = flat(head(*features))
        functions = criteria * len(outputs) if len(criteria) == 1 else criteria
        return {str(k): f(z) for k, (f, z) in enumerate(zip(functions, outputs, strict=True))}

    return loss_fn


def cotangents_like(
    logits: DecoupledLogits, *, seed: int = 1, layout: str = "contiguous"
) -> tuple[Tensor, ...]:
    """Random gradients of all logits, fused first."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        random_tensor(z.shape, generator, dtype=z.dtype, layout=layout).to(z.device)
        for z in flat(logits)
    )


def make_target(
    problem: Problem, *, ignored: float = 0.0, ignore_index: int = -100, seed: int = 2
) -> Tensor:
    """Random class indices for a problem's rows, that share of which is to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    leading = problem.features[0].shape[:-1]
    classes = problem.weights[-1].shape[0]
    target = torch.randint(max(1, classes), leading, generator=generator)
    drawn = torch.rand(leading, generator=generator) < ignored
    return target.masked_fill(drawn, ignore_index).to(problem.features[0].device)


def make_present(problem: Problem, *, share: float = 0.6, seed: int = 3) -> tuple[Tensor, ...]:
    """Random masks that say of each row which modalities it has, that share of them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (torch.rand(h.shape[:-1], generator=generator) < share).to(h.device)
        for h in problem.features
    )


def loss_gradients(
    loss: DecoupledLoss, problem: Problem, upstream: float = 1.0
) -> dict[str, Tensor | None]:
    """Gradients of all of a problem's tensors, by a total that was scaled by `upstream`."""
    named = {name: tensor for name, tensor in problem.named() if tensor.requires_grad}
    if not loss.total.requires_grad:
        return dict.fromkeys(named)
    grad = torch.full_like(loss.total, upstream)
    found = torch.autograd.grad(loss.total, list(named.values()), grad, allow_unused=True)
    return dict(zip(named, found, strict=True))


def gradients(
    logits: DecoupledLogits, problem: Problem, cotangents: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Gradients of all of a problem's tensors; `None` where nothing reaches one.

    A cotangent that is `None` leaves its branch out, as a loss does that does not use it.
    """
    named = {name: tensor for name, tensor in problem.named() if tensor.requires_grad}
    used = [
        (z, g)
        for z, g in zip(flat(logits), cotangents, strict=True)
        if g is not None and z.requires_grad
    ]
    if not used:
        return dict.fromkeys(named)
    outputs, grads = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, list(named.values()), grads, allow_unused=True)
    return dict(zip(named, found, strict=True))


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where only one of them is NaN."""
    if actual.shape != truth.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(truth.shape)}")
    difference = (actual.detach().double() - truth.detach().double()).abs()
    both_nan = actual.isnan() & truth.isnan()
    difference = difference.masked_fill(both_nan.to(difference.device), 0.0)
    difference = torch.nan_to_num(difference, nan=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


def magnitude(tensor: Tensor) -> float:
    """The largest absolute value that is not NaN."""
    values = tensor.detach().double().abs()
    return float(values.masked_fill(values.isnan(), 0.0).max()) if tensor.numel() else 0.0


def assert_same(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    tolerance: float = 1e-12,
) -> None:
    """Asserts equal names, equal `None`s, and values within a relative tolerance of the largest."""
    assert_same_names(actual, expected)
    for name, truth in expected.items():
        value = actual[name]
        if truth is not None and value is not None:
            bound = tolerance * max(magnitude(truth), 1.0)
            found = error(value, truth)
            if not found <= bound:
                raise AssertionError(f"{name}: error {found:.3g}, allowed {bound:.3g}")


def assert_two_references(
    actual: Mapping[str, Tensor | None],
    composition: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    roundings: float = 1.0,
) -> None:
    """Asserts that no error against float64 exceeds that of the same-dtype PyTorch composition.

    The margin is so many roundings of the largest value in that dtype. In float32 two orders of
    summing a dot product differ by as much as each is off, so there twice the composition's error
    is allowed; a 16-bit result is summed in float32 and rounded once, whatever the order.
    """
    assert_same_names(actual, truth)
    assert_same_names(composition, truth)
    for name, exact in truth.items():
        value, same_dtype = actual[name], composition[name]
        if exact is None or value is None or same_dtype is None:
            continue
        if value.dtype != same_dtype.dtype:
            raise AssertionError(f"{name}: expected {same_dtype.dtype}, got {value.dtype}")
        margin = roundings * torch.finfo(value.dtype).eps * magnitude(exact)
        factor = 1 if value.dtype.itemsize < 4 else 2
        bound = factor * error(same_dtype, exact) + margin
        found = error(value, exact)
        if not found <= bound:
            raise AssertionError(f"{name}: error {found:.3g}, allowed {bound:.3g}")


def assert_within_rounding(
    actual: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    absolute: Mapping[str, Tensor | None],
    terms: int,
) -> None:
    """Asserts that every entry is as near to the truth as summing in any order must come.

    A sum of n products is off by at most n roundings of the sum of their absolute values, and the
    result is rounded once more to its own dtype.

    Args:
        actual: float32, bfloat16 or float16 results, summed in float32.
        truth: the same in float64.
        absolute: the same in float64 from the absolute values of all inputs.
        terms: no sum, nor chain of sums, has more.
    """
    assert_same_names(actual, truth)
    for name, exact in truth.items():
        value, bound = actual[name], absolute[name]
        if value is None or exact is None or bound is None:
            continue
        info = torch.finfo(value.dtype)
        allowed = terms * torch.finfo(torch.float32).eps * bound
        allowed = allowed + info.eps * exact.abs() + info.smallest_normal * info.eps
        wrong = (value.double() - exact).abs() > allowed
        if wrong.any() or value.isnan().any():
            raise AssertionError(
                f"{name}: {int(wrong.sum())} entries are further off than rounding"
            )


def assert_same_names(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]
) -> None:
    """Asserts that the same entries are there and that the same ones are `None`."""
    if list(actual) != list(expected):
        raise AssertionError(f"names differ: {list(actual)} and {list(expected)}")
    for name in expected:
        if (actual[name] is None) != (expected[name] is None):
            raise AssertionError(
                f"{name}: expected {'None' if expected[name] is None else 'a tensor'}, "
                f"got {'None' if actual[name] is None else 'a tensor'}"
            )


# Gradients of a step's total: as autograd has it, as a loss scaler has it, and one that rounds.
UPSTREAM = [1.0, 65536.0, 1 / 3]
Results = Mapping[str, Tensor]


def assert_no_less_exact(
    actual: Results,
    composition: Results,
    truth: Results,
    dtype: torch.dtype,
    roundings: float = 1.0,
) -> None:
    """The two-reference rule for the results of a step whose features are of this dtype."""
    # A gradient past the dtype's range is infinite in both; compared is what both can hold.
    # How far a single number is off is luck: losses are compared at the features' precision.
    there = torch.finfo(dtype).max
    overflows = {name: value.abs() > there for name, value in truth.items()}
    rounded, composition, exact = (
        {name: value.detach().masked_fill(overflows[name], 0.0) for name, value in result.items()}
        for result in (actual, composition, truth)
    )
    rounded, composition = (
        {name: value.to(dtype) for name, value in result.items()}
        for result in (rounded, composition)
    )
    assert_two_references(rounded, composition, exact, roundings)

"""Memory, launches and comparisons for kernels on the emulator."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from emulator.bounded import Bounded

STORAGE = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.uint8),
}


def module_folder() -> Path:
    default = Path(__file__).resolve().parents[2] / "build" / "cpp"
    return Path(os.environ.get("DGL_EXT_CPP_TESTS", default))


@lru_cache  # an extension module must not be initialised twice
def load(name: str, folder: Path | None = None):
    """The pybind11 module `name`, or None where it has not been built."""
    for path in sorted(
        (folder or module_folder()).rglob(name + sysconfig.get_config_var("EXT_SUFFIX"))
    ):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float64 values as stored, rounded to nearest."""
    if dtype != "bfloat16":
        return values.astype(STORAGE[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@dataclass(frozen=True)
class Layout:
    """Where tensors lie. Aligned: bases and row strides are multiples of 16 bytes."""

    aligned: bool = True
    gap: int = 0  # elements between rows, before rounding up
    at_end: bool = True  # the guard page follows the last element, else precedes the first


PACKED = Layout(aligned=False)


def absent_rows(mask: Tensor | None, rows: int) -> np.ndarray:
    """Which rows a mask says are not there."""
    return np.zeros(rows, bool) if mask is None else np.array(mask.elements)[0] == 0


class Tensor:
    """A (rows, columns) matrix in a guarded buffer; gaps between rows hold NaN."""

    def __init__(self, module, name, shape, dtype, layout, values=None):
        self.name, self.dtype = name, dtype
        rows, columns = shape
        item = STORAGE[dtype].itemsize
        stride = columns + layout.gap
        if layout.aligned:
            stride = -(-stride * item // 16) * 16 // item
        size = (rows - 1) * stride + columns if rows and columns else 0
        self.buffer = module.Buffer(
            name, size * item, 16 if layout.aligned else item, layout.at_end, values is not None
        )
        stored = self.buffer.bytes.view(STORAGE[dtype])
        self.elements = np.lib.stride_tricks.as_strided(stored, shape, (stride * item, item))
        self.inside = np.zeros(size, bool)  # lazily, so that a sparse one costs nothing
        np.lib.stride_tricks.as_strided(self.inside, shape, (stride, 1))[...] = True
        self.stored = stored
        self.pair = (self.buffer.address, stride)
        if values is not None and size:
            self.elements[...] = encode(np.asarray(values), dtype)

    @property
    def values(self) -> np.ndarray:
        return decode(np.array(self.elements), self.dtype)

    def check_surroundings(self):
        if self.buffer.sparse or not len(self.stored):
            return
        assert self.buffer.slack_intact(), f"stray write next to {self.name}"
        gaps = self.stored.view(np.uint8).reshape(len(self.stored), -1)[~self.inside]
        assert (gaps == 0xFF).all(), f"stray write between rows of {self.name}"


@dataclass(frozen=True)
class Poison:
    """One element of one input that is not a finite number."""

    tensor: str
    row: int
    column: int
    value: float


class Memory:
    """All tensors of one problem."""

    def __init__(self, module, layout: Layout, dtype: str, seed: int, poison: tuple[Poison, ...]):
        self.module, self.layout, self.dtype, self.poison = module, layout, dtype, poison
        self.random = np.random.default_rng(seed)
        self.tensors: list[Tensor] = []

    def place(self, name, shape, values=None, dtype=None, layout=None) -> Tensor:
        tensor = Tensor(
            self.module, name, shape, dtype or self.dtype, layout or self.layout, values
        )
        self.tensors.append(tensor)
        for spot in self.poison:
            if spot.tensor == name and values is not None:
                value = encode(np.array(spot.value), tensor.dtype)
                tensor.elements[spot.row, spot.column] = value
        return tensor

    def input(self, name, shape, scale=1.0, layout=None) -> Tensor:
        return self.place(name, shape, scale * self.random.standard_normal(shape), layout=layout)

    def masks(self, absent: tuple[float, ...], features: list[Tensor]) -> list[Tensor | None]:
        """Which rows are there, None for all; what the others' features hold becomes NaN."""
        masks: list[Tensor | None] = []
        for i, feature in enumerate(features):
            share = absent[i] if i < len(absent) else 0
            if not share:
                masks.append(None)
                continue
            present = self.random.random((1, len(feature.elements))) >= share
            masks.append(self.place(f"present {i}", present.shape, present, "bool", PACKED))
            feature.elements[~present[0]] = encode(np.array(np.nan), feature.dtype)
        return masks

    def bounded(self, tensor: Tensor) -> Bounded:
        return Bounded(tensor.values, 0.0, "float64" if self.dtype == "float64" else "float32")

    def check_poison(self):
        missing = {spot.tensor for spot in self.poison} - {t.name for t in self.tensors}
        assert not missing, f"poison for inputs that are not there: {missing}"

    def check_surroundings(self):
        for tensor in self.tensors:
            tensor.check_surroundings()


@dataclass(frozen=True)
class Schedule:
    seed: int = 1
    policy: str = "priorities"
    delivery: str = "late"
    multiprocessors: int = 3


def counted(module, problem, direction: str) -> tuple[int, int]:
    """Launches, and products of the library among them, of one call."""
    before = module.statistics()
    getattr(problem, "run_" + direction)()
    after = module.statistics()
    return tuple(after[name] - before[name] for name in ("launches", "matmuls"))


def launch(
    module, name, problem, precision, schedule: Schedule, request=None, races=False, watched=None
):
    """Plans and runs one launch in freshly poisoned workspace; returns the plan."""
    device = module.Device(multiprocessors=schedule.multiprocessors)
    request = request or module.PlanRequest(executor=module.Executor.fused)
    plan = getattr(module, "plan_" + name)(problem, precision, device, request)
    workspace = module.Buffer("workspace", plan.launch.workspace_bytes, 16, True, False)
    module.watch(workspace.address, watched(plan) if watched else 0)
    module.configure(
        seed=schedule.seed,
        policy=module.policies.index(schedule.policy),
        delivery=module.deliveries.index(schedule.delivery),
        detect_races=races,
    )
    launches = module.statistics()["launches"]
    status = getattr(module, name)(problem, precision, plan, workspace.address)
    assert status == 0, f"{name} returned error {status}: no such kernel in the list"
    if plan.launch.executor == module.Executor.fused:
        assert module.statistics()["launches"] - launches <= 1, f"{name} is more than one kernel"
    assert workspace.slack_intact(), "stray write next to the workspace"
    return plan


def uses_tf32(plan, case) -> bool:
    """Our kernels are exact where operands are not aligned; the library does not ask."""
    if case.executor == "library":
        return case.tile.startswith("tf32")
    return plan.launch.tile.name.startswith("tf32")


def check(tensor: Tensor, expected: Bounded):
    """Every element within its bound, or the same NaN or infinity; says which one is not."""
    got = tensor.values
    wanted = expected.value.reshape(got.shape)
    bound = expected.error.reshape(got.shape)
    with np.errstate(invalid="ignore"):
        close = np.abs(got - wanted) <= bound
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    wrong = ~np.where(np.isfinite(wanted), close, same)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{tensor.name}: {wrong.sum()} of {wrong.size} elements wrong, first {at}: "
            f"got {got[at]}, expected {wanted[at]} within {bound[at]:.3g}"
        )


def check_untouched(tensor: Tensor):
    assert (tensor.stored.view(np.uint8) == 0xFF).all(), f"{tensor.name} was written"

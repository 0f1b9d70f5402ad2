"""How the CUDA kernels run a head: path, tile, grid and workspace of its two launches.

Asked by `python -m dgl_ext --plan`. It needs no GPU: without one it describes a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import _extension
from .heads import get_head

# In the order of `Tile` in csrc/plan.h.
TILES = (
    "float64",
    "float32_small",
    "float32_large",
    "tf32_small",
    "tf32_large",
    "half_small",
    "half_large",
    "half_xlarge",
)
_LAUNCH_NUMBERS = 8


class CudaDevice(NamedTuple):
    """What a plan knows of a GPU.

    Attributes:
        multiprocessors: how many it has.
        capability: 10 * major + minor.
        resident_ctas: of each of `TILES`, how many one multiprocessor holds.
    """

    multiprocessors: int
    capability: int
    resident_ctas: tuple[int, ...]


# An H100 or H200; the CTAs are those that the kernels' registers are limited for, so that a real
# one may hold more of the small tiles.
NOMINAL = CudaDevice(132, 90, (3, 3, 2, 3, 2, 3, 2, 1))


class Launch(NamedTuple):
    """One launch of a plan.

    Attributes:
        path: "kernel", or "composed" where library GEMMs run and the rest does not count.
        tile: the configuration, one of `TILES`.
        shape: rows, columns and depth of the tile.
        cooperative: whether it has grid-wide syncs.
        grid: number of CTAs.
        workspace_bytes: scratch memory.
    """

    path: str
    tile: str
    shape: tuple[int, int, int]
    cooperative: bool
    grid: int
    workspace_bytes: int

    def __str__(self) -> str:
        if self.path == "composed":
            return "composed: library GEMMs on views of the weight"
        sync = "grid-wide syncs" if self.cooperative else "no grid-wide sync"
        return (
            f"kernel: tile {self.tile} {'x'.join(map(str, self.shape))}, {self.grid} CTAs, "
            f"{sync}, workspace {self.workspace_bytes:,} bytes"
        )


class Plan(NamedTuple):
    """The launches of a training step in logits mode."""

    forward: Launch
    backward: Launch


def current_device() -> CudaDevice | None:
    """The current GPU, None where there is none or the CUDA kernels are not loaded."""
    if not (_extension.available("cuda") and torch.cuda.is_available()):
        return None
    multiprocessors, capability, *ctas = torch.ops.dgl_ext.cuda_device.default()
    return CudaDevice(multiprocessors, capability, tuple(ctas))


def plan(
    fusion: str,
    rows: int,
    widths: Sequence[int],
    classes: int,
    *,
    dtype: torch.dtype = torch.float32,
    allow_tf32: bool = False,
    device: CudaDevice = NOMINAL,
) -> Plan:
    """Returns how a head of these sizes runs on contiguous, aligned tensors without leaks.

    Args:
        fusion: "concat", "sum" or "film".
        rows: B.
        widths: D of each modality.
        classes: C.
        dtype: of all tensors.
        allow_tf32: whether float32 products may be tf32.
        device: the GPU.

    Raises:
        ValueError: `fusion` or `widths` do not fit.
        RuntimeError: the extension did not load, or `dtype` is none of those it computes.

    Example:
        >>> launches = dgl_ext.plan.plan("concat", 64, (512, 512), 309)
        >>> launches.forward.path, launches.forward.tile
        ('kernel', 'float32_small')
    """
    get_head(fusion).check_count("widths", len(widths), "entries")
    _extension.require()
    numbers = torch.ops.dgl_ext.cuda_plan.default(
        fusion == "film",
        rows,
        list(widths),
        classes,
        str(dtype).removeprefix("torch."),
        allow_tf32,
        [device.multiprocessors, device.capability, *device.resident_ctas],
    )
    return Plan(_launch(numbers[:_LAUNCH_NUMBERS]), _launch(numbers[_LAUNCH_NUMBERS:]))


def _launch(numbers: Sequence[int]) -> Launch:
    composed, tile, rows, columns, depth, cooperative, grid, workspace = numbers
    shape = (rows, columns, depth)
    path = "composed" if composed else "kernel"
    return Launch(path, TILES[tile], shape, bool(cooperative), grid, workspace)

"""How much memory a step takes at its peak.

Measure in a process of its own (what an earlier step left in the allocator would hide what a later
one takes) and after a first step, which makes what is kept: the optimiser's state, code compiled
for these shapes, the libraries' buffers.

On the CPU the peak is that of the resident set, which Linux keeps (VmHWM) and lets a process reset.
It counts everything: tensors, buffers of the GEMM library, the allocator's own losses. Those losses
depend on chance; of a step of 10 MB they make 10 %. Start the process with `ALLOCATOR` in its
environment to be rid of most of them. On CUDA the peak is that of what torch's allocator has handed
out.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from providers import Unavailable

# Makes glibc take every tensor of more than 32 KiB from the system and return it when it is freed.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_TRIM_THRESHOLD_": "0",
}

RESET_PEAK = "5"  # what /proc/PID/clear_refs takes to set VmHWM to the resident set

_PROC = Path("/proc/self")


def peak_extra(step: Callable[[], object], device: torch.device) -> int:
    """Run a step; returns how many bytes more than before it there were at its peak.

    Raises:
        Unavailable: this system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_free_memory()
    try:
        (_PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError as error:
        raise Unavailable(f"needs Linux's /proc/self/clear_refs: {error}") from error
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _give_back_free_memory() -> None:
    """Make the allocator return what was freed, or the step could use it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")

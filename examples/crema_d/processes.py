"""One process or several: who am I, sums over all, and the check that all agree."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: of this process, 0 to world - 1.
        world: number of processes.
        device: that this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Collects one picklable value from every process, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def share_buffers(self, model: nn.Module) -> None:
        """Takes the first process's buffers: BatchNorm statistics are of a process's own rows."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def check_parameters(self, model: nn.Module) -> None:
        """Makes sure that all processes hold the same parameters, to the bit.

        Raises:
            RuntimeError: they do not: some gradient was not reduced.
        """
        if self.world == 1:
            return
        differs = torch.zeros((), dtype=torch.int64, device=self.device)
        for parameter in model.parameters():
            first = parameter.detach().clone()
            dist.broadcast(first, src=0)
            differs += int(not torch.equal(first, parameter))
        if self.add_up(differs).item():
            raise RuntimeError("the processes' parameters have drifted apart")


def start(device: str) -> Processes:
    """Joins the process group if torchrun started this process.

    Args:
        device: "auto", "cpu" or "cuda"; with torchrun each process takes its own GPU.

    Returns:
        This process.

    Raises:
        ValueError: there is no CUDA device, or there are fewer than processes on this machine.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ValueError(f"--device cuda: process {local} here, but torch sees {found} devices")
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    index = local if kind == "cuda" else None
    return Processes(int(os.environ.get("RANK", 0)), world, torch.device(kind, index))


def stop() -> None:
    """Leaves the process group."""
    if not dist.is_initialized():
        return
    gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if gloo:
        # Its threads may still hold the last collective's tensors. One that lets go of them while
        # the interpreter shuts down aborts the process (torch 2.13).
        time.sleep(0.5)

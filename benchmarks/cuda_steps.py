"""What only CUDA has: a training step as a CUDA graph, and the count of its kernels.

`torch.cuda` and `torch.profiler.profile` are arguments, so that the order of the calls can be
tested on a machine without a GPU.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import providers
import torch
from torch import Tensor

WARM_UPS = 3


@dataclass(frozen=True)
class Captured:
    """A step as a graph: each call replays it. Keeps the memory that the replays write."""

    replay: Callable[[], object]
    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]

    def __call__(self) -> None:
        self.replay()

    def results(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
        """Replay once and return outputs and gradients; what the replay does not write is NaN."""
        for tensor in (*self.outputs, *self.gradients.values()):
            if tensor is not None:
                tensor.fill_(torch.nan)
        self.replay()
        return self.outputs, self.gradients


class Gpu:
    """Captures steps and counts their kernels on one CUDA device."""

    def __init__(
        self,
        device: torch.device,
        cuda: Any = torch.cuda,
        profile: Callable[..., Any] = torch.profiler.profile,
    ) -> None:
        self._device = device
        self._cuda = cuda
        self._profile = profile

    def capture(self, step: providers.Step, leaves: dict[str, Tensor]) -> Captured:
        """Capture one whole step: forward, losses, backward.

        Raises:
            providers.Unavailable: the step cannot be captured.
        """
        cuda = self._cuda
        with cuda.device(self._device):
            side = cuda.Stream(self._device)
            side.wait_stream(cuda.current_stream(self._device))
            # The outer context also restores the stream where a failed capture leaves it set.
            with cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
                # Gradients must come from the graph's memory, and no autograd graph of an earlier
                # step may be alive: its nodes would add to them on the stream of that step.
                for leaf in leaves.values():
                    leaf.grad = None
                gc.collect()
                graph, outputs = self._capture(step, side)
            cuda.current_stream(self._device).wait_stream(side)
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        return Captured(graph.replay, outputs, gradients)

    def _capture(self, step: providers.Step, side: Any) -> tuple[Any, tuple[Tensor, ...]]:
        graph = self._cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            with self._cuda.graph(graph, stream=side):
                try:
                    # Detached: what is kept must not keep the step's autograd graph alive.
                    outputs = tuple(output.detach() for output in step())
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # A broken capture fails again at its end; the first failure tells more.
            reason = providers.reason(failure or error)
            raise providers.Unavailable(f"no CUDA graph of it can be captured: {reason}") from error
        return graph, outputs

    def launches(self, step: providers.Step) -> int:
        """Count the kernels of one step; copies and fills by the driver are not kernels.

        Raises:
            providers.Unavailable: the profiler saw none.
        """
        with self._cuda.device(self._device):
            step()  # what happens once only is not counted
            self._cuda.synchronize()
            with self._profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                step()
                self._cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        count = sum(event.get("cat") == "kernel" for event in events)
        if count == 0:
            raise providers.Unavailable(
                "torch.profiler saw no kernels (does this user have access to the GPU's counters?)"
            )
        return count

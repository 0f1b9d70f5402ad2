"""Hypothesis profiles, and what every test module shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import dgl_ext
from dgl_ext._arguments.heads import HEADS

# What needs a GPU is not collected where there is none; `make gpu-check` runs it.
_HERE = Path(__file__).parent
collect_ignore = (
    []
    if torch.cuda.is_available()
    else [str(path) for path in _HERE.glob("gpu/test_*.py") if path.name != "test_gpu_check.py"]
)

# Timings on a shared machine say nothing about a case, so no deadline.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.register_profile("long", max_examples=100_000, **_COMMON)
settings.load_profile("ci")


@pytest.fixture(params=list(HEADS))
def fusion(request: pytest.FixtureRequest) -> str:
    """Every registered head."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def extension_is_loaded() -> None:
    """Without the extension the tests would compare the reference with itself."""
    dgl_ext._ops.extension.require()


@pytest.fixture
def workspace_limit() -> Iterator[Callable[[int | None], None]]:
    """Sets the bound on a step's workspace, back to the default with None and after the test."""

    def set_limit(limit: int | None) -> None:
        dgl_ext.set_workspace_limit(limit)

    yield set_limit
    set_limit(None)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone.

    It is destroyed after the test's own variables: a wrapped model that outlives it would hold it
    last, and gloo then waits for a thread that waits for Python (seen once, a hang for good).
    """
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

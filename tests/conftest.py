"""Hypothesis profiles, and what every test module shares."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

import dgl_ext
from dgl_ext.heads import HEADS

# Timings on a shared machine say nothing about a case, so no deadline.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.register_profile("long", max_examples=100_000, **_COMMON)
settings.load_profile("ci")

BACKENDS = ("reference", "composed", "cpu")


@pytest.fixture(params=list(HEADS))
def fusion(request: pytest.FixtureRequest) -> str:
    """Every registered head."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def extension_is_loaded() -> None:
    """Without the extension the tests would compare the reference with itself."""
    dgl_ext._extension.require()

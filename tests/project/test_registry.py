"""One list of heads: every table has the same keys, so that a new head is tested by registering."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import flop_registry

import dgl_ext
from dgl_ext._arguments.heads import HEADS
from dgl_ext._ops import library as _ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

TABLES = [
    ("dgl_ext.reference", "FORMULAS"),
    ("dgl_ext.nn", "MODULES"),
    ("support.two_pass", "PLAIN_HEADS"),
    ("problems", "PLAIN_HEADS"),
    ("providers", "BRANCHES"),
]


@pytest.mark.parametrize(("module", "table"), TABLES)
def test_every_table_has_every_head(module, table):
    assert list(getattr(importlib.import_module(module), table)) == list(HEADS)


@pytest.mark.parametrize("kind", ["forward", "backward", "step"])
def test_every_head_has_its_ops(fusion, kind):
    name = f"{HEADS[fusion].op}_{kind}"
    assert name in _ops.FAKE_KERNELS
    assert getattr(torch.ops.dgl_ext, name) in flop_registry


def test_every_head_is_in_the_docs(fusion):
    for text in (
        (ROOT / "README.md").read_text(),
        dgl_ext.fused_decouple.__doc__,
        dgl_ext.fused_decouple_cross_entropy.__doc__,
    ):
        assert fusion in text


def test_every_head_goes_by_its_own_name():
    assert {name: head.name for name, head in HEADS.items()} == {name: name for name in HEADS}
    modules = dgl_ext.nn.MODULES
    assert {name: module.fusion for name, module in modules.items()} == {n: n for n in HEADS}


def test_public_names_are_there_after_import():
    assert set(dgl_ext.__all__) <= set(dir(dgl_ext))
    for name in ("nn", "reference"):
        assert hasattr(dgl_ext, name)

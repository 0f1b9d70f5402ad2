"""One list of heads: every table has the same keys, so that a new head is tested by registering."""

from __future__ import annotations

import dgl_ext
from dgl_ext import reference
from dgl_ext.heads import HEADS
from dgl_ext.nn import MODULES


def test_every_table_has_every_head():
    for table in (reference.FORMULAS, MODULES):
        assert list(table) == list(HEADS)


def test_every_head_goes_by_its_own_name():
    assert {name: head.name for name, head in HEADS.items()} == {name: name for name in HEADS}
    assert {name: module.fusion for name, module in MODULES.items()} == {n: n for n in HEADS}


def test_public_names_are_there_after_import():
    assert set(dgl_ext.__all__) <= set(dir(dgl_ext))
    for name in ("nn", "reference"):
        assert hasattr(dgl_ext, name)

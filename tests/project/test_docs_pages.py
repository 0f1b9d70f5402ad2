"""Every code block of the pages in docs/ runs; `pages.py` says how."""

from __future__ import annotations

import pages
import pytest
import torch

BLOCKS = [block for page in pages.pages() for block in pages.blocks(page) if block.title is None]


def params() -> list:
    def marks(block: pages.Block) -> list:
        gpu = [pytest.mark.gpu] if block.kind == "python gpu" else []
        return gpu + ([pytest.mark.slow] if block.needs else [])

    return [pytest.param(b, id=b.name, marks=marks(b)) for b in BLOCKS]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("block", params())
def test_block(block, tmp_path, monkeypatch):
    if block.kind == "python gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if block.needs:
        pytest.importorskip(block.needs)
    monkeypatch.chdir(tmp_path)
    block.run(tmp_path)


def test_blocks_are_found():
    kinds = {block.kind for block in BLOCKS if block.needs is None}
    assert kinds == {"python", "python gpu", "sh"}
    assert {"from-published-code.md", "training.md", "works-with.md"} <= set(pages.pages())


@pytest.mark.parametrize("page", pages.pages())
def test_every_file_of_a_page_is_used(page):
    found = pages.blocks(page)
    for file in (block for block in found if block.title is not None):
        stem = file.title.removesuffix(".py")
        others = "".join(block.code for block in found if block is not file)
        assert f"import {stem}" in others or f"from {stem} " in others or file.title in others

"""Every code block of the pages in docs/ runs; `pages.py` says how."""

from __future__ import annotations

import pages
import pytest
import torch

BLOCKS = [block for page in pages.pages() for block in pages.blocks(page) if block.title is None]


def params() -> list:
    marks = {"python gpu": [pytest.mark.gpu]}
    return [pytest.param(b, id=b.name, marks=marks.get(b.kind, [])) for b in BLOCKS]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("block", params())
def test_block(block, tmp_path, monkeypatch):
    if block.kind == "python gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.chdir(tmp_path)
    block.run(tmp_path)


def test_blocks_are_found():
    kinds = {block.kind for block in BLOCKS}
    assert kinds == {"python", "python gpu", "sh"}
    assert pages.pages() == ["from-published-code.md", "training.md", "works-with.md"]


@pytest.mark.parametrize("page", pages.pages())
def test_every_file_of_a_page_is_used(page):
    found = pages.blocks(page)
    for file in (block for block in found if block.title is not None):
        stem = file.title.removesuffix(".py")
        others = "".join(block.code for block in found if block is not file)
        assert f"import {stem}" in others or f"from {stem} " in others or file.title in others


@pytest.mark.parametrize(
    "text", ["```\ncode\n```\n", "```c++\nint i;\n```\n", "- item\n\n  ```python\n  1\n  ```\n"]
)
def test_a_block_that_nothing_would_run_raises(text, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md"):
        pages.blocks("page.md")


def test_a_block_that_fails_fails_its_test(tmp_path, monkeypatch):
    docs, folder = tmp_path / "docs", tmp_path / "run"
    docs.mkdir(), folder.mkdir()
    monkeypatch.setattr(pages, "DOCS", docs)
    (docs / "page.md").write_text(
        '```python title="a.py"\nX = 1\n```\n```python\nimport a\nassert a.X == 2\n```\n'
    )
    with pytest.raises(AssertionError):
        pages.blocks("page.md")[1].run(folder)

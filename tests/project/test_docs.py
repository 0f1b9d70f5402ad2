"""Every code block of the README and every docstring example runs."""

from __future__ import annotations

import csv
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from support.problems import assert_same
from support.two_pass import named_logits

import dgl_ext
from dgl_ext.types import DecoupledLogits

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_code_runs_from_top_to_bottom_and_equals_what_it_says():
    names: dict = {}
    assert len(blocks()) == 4
    for block in blocks():
        exec(compile(block, "README.md", "exec"), names)
    assert all(
        encoder.weight.grad is not None
        for encoder in (names["audio_encoder"], names["video_encoder"])
    )
    assert names["head"].weight.grad is not None

    features, weight, bias = names["features"], names["weight"], names["bias"]
    fused, unimodal = names["equivalent"](features, weight, bias)
    slower = DecoupledLogits(fused, tuple(unimodal))
    assert_same(named_logits(names["out"]), named_logits(slower), 1e-5)
    cotangents = [torch.randn_like(z) for z in (fused, *unimodal)]
    inputs = [*features, weight, bias]
    found, expected = (
        torch.autograd.grad([logits.fused, *logits.unimodal], inputs, cotangents)
        for logits in (names["out"], slower)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["functional", "nn.heads"])
def test_docstring_examples(name):
    module = importlib.import_module(f"dgl_ext.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch, "dgl_ext": dgl_ext})
    assert result.attempted > 0
    assert result.failed == 0


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


MODULES = ["functional", "types", "nn.heads", "nn.decoupled", "diagnostics._attenuation"]


@pytest.mark.parametrize("page", PAGES + MODULES)
def test_names_of_the_package_are_names_that_it_has(page):
    """In pages and in docstrings, of which `make docs` makes the API pages."""
    if page.endswith(".md"):
        text = (ROOT / page).read_text()
    else:
        text = Path(importlib.import_module(f"dgl_ext.{page}").__file__).read_text()
    for name in set(re.findall(r"`dgl_ext((?:\.[A-Za-z]\w*)+)`", text)):
        found = dgl_ext
        for part in name[1:].split("."):
            assert hasattr(found, part), f"dgl_ext{name}"
            found = getattr(found, part)


def test_the_tables_show_the_committed_results():
    results = ROOT / "benchmarks" / "results" / "bench_fusion_step_cpu_float32.csv"
    with results.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["provider"] == "dgl_ext"]
    columns = ("ratio_to_joint", "ratio_to_two_pass", "ratio_to_reference")
    speed = (ROOT / "docs" / "speed.md").read_text()
    assert len(rows) == 18
    for row in rows:
        size = " x ".join(row[name] for name in ("batch", "width", "classes"))
        ratios = " | ".join(f"{float(row[name]):.2f}" for name in columns)
        pattern = rf"^\| {row['fusion']} \| {size} \| .* \| {re.escape(ratios)} \|$"
        assert re.search(pattern, speed, re.M), (row["fusion"], size)
    shown = re.findall(r"^\| (?:concat|sum|film) \| \d.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(shown) == 6
    assert set(shown) <= set(speed.splitlines())


def test_the_page_shows_the_committed_memory():
    results = ROOT / "benchmarks" / "results" / "bench_memory_cpu_float32.csv"
    with results.open() as lines:
        measured = {
            (row["rows"], row["classes"], row["provider"]): row for row in csv.DictReader(lines)
        }
    page = (ROOT / "docs" / "speed.md").read_text()
    shown = re.findall(r"^\| ([\d,]+) x ([\d,]+) \| (\d+) \| (.*) \|$", page, re.M)
    assert len(shown) == 4
    for rows, classes, gradients, cells in shown:
        for provider, cell in zip(
            ("joint", "dgl_ext_logits", "linear_cross_entropy", "dgl_ext"),
            cells.split(" | "),
            strict=True,
        ):
            row = measured[rows.replace(",", ""), classes.replace(",", ""), provider]
            seconds = float(row["median_us"]) / 1e6
            memory = f"{int(row['extra_bytes']) / 2**20:,.0f} MiB"
            assert cell == f"{memory}, {seconds:.{1 if seconds >= 1 else 2}f} s"
            assert gradients == f"{int(row['gradient_bytes']) / 2**20:.0f}"

"""`python -m dgl_ext`, and what the package does without its extension or a recent torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import dgl_ext
from dgl_ext._ops import extension as _extension

# Hides the compiled module in a new process, with the error that a broken one raises.
BROKEN_EXTENSION = """
import importlib.abc, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "dgl_ext._C":
            raise ImportError("undefined symbol: some_symbol")

sys.meta_path.insert(0, Broken())
"""


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A run of this Python."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=check)


def test_the_report_names_what_a_bug_report_needs() -> None:
    report = run("-m", "dgl_ext").stdout
    for fact in (
        dgl_ext.__version__,
        torch.__version__,
        "C++ extension: loaded",
        "reference, fused",
    ):
        assert fact in report


def test_the_report_is_json_on_request() -> None:
    report = json.loads(run("-m", "dgl_ext", "--json").stdout)
    assert report["torch"] == torch.__version__
    assert report["extension_loaded"] is True
    assert report["extension_error"] is None
    assert report["build"]["modules"][0] == "_C"
    assert report["build"]["cuda"]["compiled"] in (True, False)
    assert report["build"]["cuda"]["reason"]
    assert report["threads"] == torch.get_num_threads()


def test_the_extension_is_loaded() -> None:
    assert _extension.available()
    assert _extension.error() is None
    _extension.require()


def test_the_cuda_part_is_loaded_where_it_was_built() -> None:
    build = json.loads(run("-m", "dgl_ext", "--json").stdout)["build"]
    assert _extension.available("cuda") == build["cuda"]["compiled"]
    if not build["cuda"]["compiled"]:
        with pytest.raises(RuntimeError, match="the CUDA extension of dgl_ext is not loaded"):
            _extension.require("cuda")


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cpu", "1.13.1"])
def test_an_older_torch_gets_a_message(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, found torch " + version[:3]):
        _extension.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git1234567", "3.0.0"])
def test_a_recent_torch_is_accepted(version: str) -> None:
    _extension.check_torch(version)


def test_importing_with_an_older_torch_fails_before_the_extension_is_loaded() -> None:
    code = BROKEN_EXTENSION + "import torch; torch.__version__ = '2.9.1'; import dgl_ext"
    done = run("-c", code, check=False)
    assert done.returncode == 1
    assert "ImportError: dgl_ext needs torch >= 2.10, found torch 2.9.1" in done.stderr


def test_without_the_extension_the_real_error_is_kept() -> None:
    code = """
import dgl_ext
from dgl_ext._ops import extension as _extension
assert not _extension.available()
assert str(_extension.error()) == "undefined symbol: some_symbol"
try:
    _extension.require()
except RuntimeError as error:
    assert error.__cause__ is _extension.error()
    print(error)
"""
    message = run("-c", BROKEN_EXTENSION + code).stdout
    assert "not loaded: undefined symbol: some_symbol" in message
    assert "python -m dgl_ext" in message


def test_without_the_extension_the_reference_still_works() -> None:
    code = """
import dgl_ext, torch
x = [torch.randn(5, 3, requires_grad=True), torch.randn(5, 4)]
w = torch.randn(2, 7)
out = dgl_ext.fused_decouple(x, w)
expected = dgl_ext.fused_decouple(x, w, backend="reference")
torch.testing.assert_close(out.fused, expected.fused)
try:
    dgl_ext.fused_decouple(x, w, backend="fused")
except RuntimeError as error:
    print(error)
"""
    assert "undefined symbol: some_symbol" in run("-c", BROKEN_EXTENSION + code).stdout


PRODUCTS = """
import dgl_ext, json, torch
torch.manual_seed(0)
x, y = torch.randn(32, 300, requires_grad=True), torch.randn(32, 200)
w, target = torch.randn(70, 500, requires_grad=True), torch.randint(70, (32,))
z = dgl_ext.fused_decouple((x, y), w).fused
dgl_ext.fused_decouple_cross_entropy((x, y), w, target).total.backward()
print(json.dumps([t.flatten().tolist() for t in (z, x.grad, w.grad)]))
"""


def test_products_are_torchs_where_that_is_asked(monkeypatch) -> None:
    results = []
    for value in ("own", "torch"):
        monkeypatch.setenv("DGL_EXT_CPU_MATMUL", value)
        results.append([torch.tensor(values) for values in json.loads(run("-c", PRODUCTS).stdout)])
    for own, theirs in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.equal(own, theirs)  # sums in another order
    monkeypatch.setenv("DGL_EXT_CPU_MATMUL", "mkl")
    failed = run("-c", PRODUCTS, check=False)
    assert 'DGL_EXT_CPU_MATMUL: expected "own" or "torch", got "mkl"' in failed.stderr

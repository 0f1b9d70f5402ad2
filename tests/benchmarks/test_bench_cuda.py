"""What the fusion benchmark does on CUDA only, with the device's side of it faked."""

from __future__ import annotations

import sys
import types

import pytest
import test_bench_fusion as plain  # puts benchmarks/ on the path
import torch
import torch.nn.functional as F

import dgl_ext

import fusion_cells  # isort: skip
import providers  # isort: skip


CUDA = torch.device("cuda", 0)
BOTH = ("eager", "graph")


def test_graphs_need_a_gpu():
    timing = fusion_cells.Timing(["joint"], BOTH)
    with pytest.raises(ValueError, match="gpu: expected one to capture for 'graph' with"):
        fusion_cells.measure(plain.cell(), timing, 1e-9)


def cuda_problem():
    features = (types.SimpleNamespace(device=CUDA, dtype=torch.float32),) * 2
    return types.SimpleNamespace(features=features, fusion="concat")


@pytest.mark.parametrize("name", ["fused", "library", "dgl_ext", "dgl_ext_logits"])
def test_dgl_ext_is_left_out_on_cuda_without_its_cuda_extension(monkeypatch, name):
    monkeypatch.setitem(dgl_ext._ops.extension._errors, "cuda", ImportError("libcudart is missing"))
    with pytest.raises(providers.Unavailable, match="CUDA extension is not loaded: libcudart is"):
        providers.PROVIDERS["step"][name].build(cuda_problem())


@pytest.mark.parametrize("mode", ["step", "logits"])
@pytest.mark.parametrize(("name", "backend"), [("fused",) * 2, ("library",) * 2, ("dgl_ext", None)])
def test_a_provider_names_its_executor_and_is_left_out_if_none_runs(
    monkeypatch, mode, name, backend
):
    monkeypatch.setitem(dgl_ext._ops.extension._errors, "cuda", None)
    monkeypatch.setattr(providers, "_device_type", lambda problem: "cuda")
    backends = []
    for function in (dgl_ext.fused_decouple, dgl_ext.fused_decouple_cross_entropy):

        def call(*args, function=function, backend=None, **kwargs):
            backends.append(backend)
            return function(*args, backend="reference", **kwargs)

        monkeypatch.setattr(dgl_ext, function.__name__, call)
    with pytest.raises(providers.Unavailable, match=r"takes the reference for cuda torch.float32"):
        providers.PROVIDERS[mode][name].build(plain.cell().problem())
    assert backends == [backend]


# --- Liger ---


def with_liger(monkeypatch, factor=1.0):
    """A stand-in on the CPU that, as Liger 0.8.5, makes no gradient where the rows need none."""

    def loss_of(rows, weight, target, bias=None):
        if not rows.requires_grad:
            weight, bias = weight.detach(), bias.detach()
        return factor * F.cross_entropy(F.linear(rows, weight, bias), target)

    name = "liger_kernel.transformers.functional"
    module = types.SimpleNamespace(liger_fused_linear_cross_entropy=loss_of)
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(providers, "_device_type", lambda problem: "cuda")


def liger_row(fusion):
    timing, here = fusion_cells.Timing(["liger", "joint"]), plain.cell(fusion, mode="step")
    fusion_cells.measure(here, timing, 1e-9, min_rounds=1)
    return fusion_cells.rows(here, timing, plain.CEILING)[0]


@pytest.mark.parametrize("fusion", ["concat", "sum", "film"])
def test_three_calls_of_liger_are_the_method_and_a_wrong_one_is_not_timed(monkeypatch, fusion):
    with_liger(monkeypatch)
    assert liger_row(fusion)["status"] == "ok"
    with_liger(monkeypatch, factor=1.001)
    row = liger_row(fusion)
    assert row["status"] == "wrong"
    assert "differs from the reference by 1.0e-03" in row["note"]


def test_liger_is_left_out_in_one_line_where_it_cannot_be_imported(monkeypatch):
    assert (liger_row("concat")["note"]) == "it runs on CUDA only"
    with_liger(monkeypatch)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    row = liger_row("concat")
    assert row["status"] == "left out"
    assert row["note"].startswith("liger-kernel cannot be imported: ModuleNotFoundError")
    assert "\n" not in row["note"]

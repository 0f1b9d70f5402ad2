"""Exported programs of a model with a head, saved, loaded and trained; results in checkpoints."""

from __future__ import annotations

import io

import pytest
import torch
from support.problems import assert_same
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dgl_ext
from dgl_ext._arguments.heads import HEADS


class Model(nn.Module):
    """Two encoders and a head; with a target its loss."""

    def __init__(self, fusion: str, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.v = nn.Linear(4, 7), nn.Linear(3, 5)
        self.head = dgl_ext.nn.MODULES[fusion]((7, 5), 6, **options)

    def forward(self, a: Tensor, v: Tensor, target: Tensor | None = None):
        return self.head(self.a(a), self.v(v), target=target)


def draw(step: bool, rows: int = 9) -> tuple[Tensor, ...]:
    inputs = torch.randn(rows, 4), torch.randn(rows, 3)
    return (*inputs, torch.randint(6, (rows,))) if step else inputs


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def results_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict:
    model.zero_grad()
    results = tree_leaves(model(*inputs))
    generator = torch.Generator().manual_seed(8)
    used = [z for z in results if z.requires_grad]
    drawn = [torch.randn(z.shape, generator=generator) for z in used]
    torch.autograd.backward(used, drawn)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return dict(enumerate(results)) | dict(sorted(gradients.items()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("fusion", HEADS)
def test_an_exported_program_trains_as_the_model_does(fusion, step, strict):
    model = Model(fusion)
    program = torch.export.export(model, draw(step), strict=strict)
    inputs = draw(step)
    expected = results_and_gradients(model, inputs)
    assert expected["a.weight"].any()
    assert expected["v.weight"].any()
    assert_same(results_and_gradients(program.module(), inputs), expected, 1e-5)
    assert_same(results_and_gradients(saved_and_loaded(program), inputs), expected, 1e-5)
    assert "dgl_ext" not in str(program.graph)  # it needs nothing of ours to run


LOSSES = {
    "classes": lambda rows: {"target": torch.randint(6, (rows,))},
    "soft": lambda rows: {"target": torch.rand(rows, 6).softmax(-1)},
    "weighted": lambda rows: {
        "target": torch.randint(6, (rows,), dtype=torch.int8),
        "sample_weight": torch.rand(rows),
        "class_weight": torch.linspace(0.1, 2, 6),
    },
    "masked": lambda rows: {
        "target": torch.randint(6, (rows,)),
        "present": (torch.rand(rows) < 0.7, torch.rand(rows) < 0.5),
    },
    "logits": lambda rows: {},
}


class Head(nn.Module):
    """A head whose options are one argument, since torch cannot name the shapes of `**options`."""

    def __init__(self, fusion: str) -> None:
        super().__init__()
        self.head = dgl_ext.nn.MODULES[fusion]((4, 3), 6)

    def forward(self, features: tuple[Tensor, ...], options: dict):
        return self.head(*features, **options)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_exported_program_takes_any_batch(fusion, kind):
    head, batch = Head(fusion), torch.export.Dim("batch", min=2)

    def draw(rows: int):
        torch.manual_seed(rows)
        return (torch.randn(rows, 4), torch.randn(rows, 3)), LOSSES[kind](rows)

    inputs = draw(9)
    shapes = tree_map(lambda x: {0: batch} if len(x) == 9 else None, inputs)
    program = torch.export.export(head, inputs, dynamic_shapes=shapes).module()
    for rows in (9, 2, 17):
        ours, theirs = tree_leaves(program(*draw(rows))), tree_leaves(head(*draw(rows)))
        assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-6)


@pytest.mark.parametrize("step", [False, True])
def test_an_explicit_backend_exports_for_inference(fusion, step):
    model = Model(fusion, backend="fused")
    with torch.no_grad():
        program = torch.export.export(model, draw(step))
        assert "dgl_ext" in str(program.graph)
        loaded, inputs = saved_and_loaded(program), draw(step)
        ours, theirs = tree_leaves(loaded(*inputs)), tree_leaves(model(*inputs))
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-6)
    with pytest.raises(RuntimeError, match=r'exported programs .* backend="reference"'):
        loaded(*inputs)


@pytest.mark.parametrize("weights_only", [True, False])
def test_results_in_checkpoints(fusion, weights_only):
    model = Model(fusion)
    with torch.no_grad():
        results = {"logits": model(*draw(False)), "loss": model(*draw(True))}
    file = io.BytesIO()
    torch.save(results, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    assert {name: type(value) for name, value in loaded.items()} == {
        "logits": dgl_ext.DecoupledLogits,
        "loss": dgl_ext.DecoupledLoss,
    }
    ours, theirs = tree_leaves(loaded), tree_leaves(results)
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "fused"])
@pytest.mark.parametrize("step", [False, True])
def test_ahead_of_time(step, backend, tmp_path):
    model, inputs = Model("film", backend=backend), draw(step)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        others = draw(step)
        ours = tree_leaves(torch._inductor.aoti_load_package(path)(*others))
        theirs = tree_leaves(model(*others))
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-5)

"""A step of each head through the installed package, away from the checkout: `python smoke.py`.

It needs torch and dgl_ext alone, so that it runs in an environment that has nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

import dgl_ext
from dgl_ext._ops import extension as _extension

ROWS, WIDTHS, CLASSES = 5, (3, 4), 2


def make_problem(fusion: str) -> tuple[list[torch.Tensor], object, object]:
    """Features, weight and bias, all leaves, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    features = [draw(ROWS, width) for width in WIDTHS]
    if fusion == "concat":
        return features, draw(CLASSES, sum(WIDTHS)), draw(CLASSES)
    if fusion == "sum":
        return features, [draw(CLASSES, w) for w in WIDTHS], [draw(CLASSES) for _ in WIDTHS]
    conditioner, target = WIDTHS
    weight = [draw(2 * target, conditioner), draw(CLASSES, target)]
    return features, weight, [draw(2 * target), draw(CLASSES)]


def step(fusion: str, backend: str) -> list[torch.Tensor]:
    """Logits, then the gradients of features, weights and biases."""
    features, weight, bias = make_problem(fusion)
    out = dgl_ext.fused_decouple(features, weight, bias, fusion=fusion, backend=backend)
    logits = [out.fused, *out.unimodal]
    target = torch.arange(ROWS) % CLASSES
    sum(torch.nn.functional.cross_entropy(z, target) for z in logits).backward()
    parameters = [*([weight, bias] if fusion == "concat" else [*weight, *bias])]
    return [*(z.detach() for z in logits), *(p.grad for p in [*features, *parameters])]


def main() -> None:
    """Compares the C++ backend with the reference for every head."""
    package = Path(dgl_ext.__file__).parent
    checkout = Path(__file__).resolve().parents[2]
    assert package.parent != checkout, f"imported from the checkout: {package}"
    _extension.require()
    for fusion in ("concat", "sum", "film"):
        for ours, expected in zip(step(fusion, "fused"), step(fusion, "reference"), strict=True):
            torch.testing.assert_close(ours, expected)
    print(f"smoke test passed: dgl_ext {dgl_ext.__version__}, torch {torch.__version__}, {package}")


if __name__ == "__main__":
    main()

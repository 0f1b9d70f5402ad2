"""A small model of two modalities and its data, for the tests of whole training loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgl_ext

WIDTHS = (5, 4)
CLASSES = 3
ALPHA = (2.0, 0.5)

Batch = tuple[Tensor, Tensor, Tensor]


class AnyFusion(nn.Module):
    """A fusion module that is no head of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(sum(WIDTHS), 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(torch.cat([x, y], dim=-1))))


# What a case can have for a head, and how: by logits, with F.cross_entropy on top, or by its loss.
HEADS = {
    name: lambda cls=cls, **options: cls(WIDTHS, CLASSES, **options)
    for name, cls in dgl_ext.nn.MODULES.items()
}
HEADS["decoupled"] = lambda: dgl_ext.nn.Decoupled(AnyFusion())
CASES = [(head, mode) for head in dgl_ext.nn.MODULES for mode in ("logits", "loss")]
CASES.append(("decoupled", "logits"))


class TwoModalities(nn.Module):
    """Two encoders and a head; called with inputs and target, it returns the total loss."""

    def __init__(self, head: str, mode: str, *, seed: int = 0, **options: object) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, width))
            for inputs, width in zip((6, 7), WIDTHS, strict=True)
        )
        self.head = HEADS[head](**options)
        self.mode = mode

    def features(self, *inputs: Tensor) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def forward(self, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return self.loss(*self.features(x, y), target=target)

    def loss(self, *features: Tensor, target: Tensor) -> Tensor:
        if self.mode == "loss":
            return self.head.cross_entropy(*features, target=target, alpha=ALPHA).total
        fused, unimodal = self.head(*features)
        losses = [F.cross_entropy(z, target) for z in unimodal]
        shares = (alpha * loss for alpha, loss in zip(ALPHA, losses, strict=True))
        return F.cross_entropy(fused, target) + sum(shares)


def batches(number: int, rows: int = 8, *, seed: int = 1) -> Iterator[Batch]:
    """Random inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield (
            torch.randn(rows, 6, generator=generator),
            torch.randn(rows, 7, generator=generator),
            torch.randint(CLASSES, (rows,), generator=generator),
        )


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(module: nn.Module, data: Iterable[Batch]) -> None:
    """The plain loop: one loss, one backward."""
    optimizer = sgd(module)
    for batch in data:
        optimizer.zero_grad()
        module(*batch).backward()
        optimizer.step()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: tensor.grad for name, tensor in module.named_parameters()}

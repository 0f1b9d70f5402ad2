"""Whole training steps: two encoders, a fusion head, losses, backward pass, optimiser.

All providers run the same network from the same weights on the same batch. The optimiser is SGD
with momentum and a learning rate of 0: it does all its arithmetic, and the network stays as it is,
so that a step does the same work however often it is repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import plain_head, plain_unimodal
from providers import Unavailable
from support.problems import Problem
from torch import Tensor, nn
from torch.nn import functional as F

from dgl_ext.nn import MODULES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Network:
    """Two encoders and what goes through them.

    Attributes:
        shapes: of one row of both inputs.
        width: of the features.
        classes: of the head.
        encoders: makes both encoders.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    width: int
    classes: int
    encoders: Callable[[], tuple[nn.Module, nn.Module]]


def _digits() -> Network:
    """The encoders of examples/av_digits: 8 x 8 digits and a second of log-mel features."""
    _see_examples()
    try:
        from av_digits import models
    except ImportError as error:  # scikit-learn
        raise Unavailable(f"examples/av_digits does not load: {error}") from error
    return Network(
        ((1, 8, 8), (1, 32, 51)),
        models.WIDTH,
        models.CLASSES,
        lambda: (models.image_encoder(False), models.audio_encoder(False)),
    )


def _see_examples() -> None:
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))


def _resnet18(width: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Network:
    """The encoders of examples/crema_d: spectrograms and frames."""
    _see_examples()
    try:
        from crema_d.models import ResNet18
    except ImportError as error:  # Pillow
        raise Unavailable(f"examples/crema_d does not load: {error}") from error
    return Network(shapes, 8 * width, 6, lambda: (ResNet18(1, width), ResNet18(3, width)))


NETWORKS: dict[str, Callable[[], Network]] = {
    "digits": _digits,
    "resnet18": lambda: _resnet18(64, ((1, 257, 188), (3, 224, 224))),
    "tiny_resnet18": lambda: _resnet18(4, ((1, 65, 47), (3, 32, 32))),
}


class Training:
    """A network with an optimiser and a batch.

    Args:
        network: a name in `NETWORKS`.
        fusion: "concat", "sum" or "film".
        batch: number of rows.
        device: of everything.
        dtype: of everything.
    """

    def __init__(
        self, network: str, fusion: str, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        kind = NETWORKS[network]()
        random = torch.Generator().manual_seed(0)
        self.fusion = fusion
        self.inputs = [
            torch.randn(batch, *shape, generator=random).to(device, dtype) for shape in kind.shapes
        ]
        self.target = torch.randint(kind.classes, (batch,), generator=random).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoders = nn.ModuleList(kind.encoders()).to(device, dtype)
            head = MODULES[fusion]((kind.width, kind.width), kind.classes)
            self.head = head.to(device, dtype)
        self.parameters = [*self.encoders.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)

    def features(self) -> tuple[Tensor, Tensor]:
        """Of both encoders."""
        x, y = (encode(value) for encode, value in zip(self.encoders, self.inputs, strict=True))
        return x, y

    def plain(self) -> Problem:
        """The head and this batch's features, as one would write it without the method."""
        head = self.head
        layers = {
            "concat": lambda: [head.linear],
            "sum": lambda: [*head.linears],
            "film": lambda: [head.film, head.out],
        }[self.fusion]()
        weights = tuple(layer.weight for layer in layers)
        return Problem(self.fusion, self.features(), weights, tuple(layer.bias for layer in layers))

    def gradients(self) -> dict[str, Tensor | None]:
        """Of all parameters, by name."""
        named = {"encoders": self.encoders, "head": self.head}
        return {
            f"{part}.{name}": parameter.grad
            for part, module in named.items()
            for name, parameter in module.named_parameters()
        }


def _joint(training: Training) -> Step:
    """Plain joint training: one head, one loss. No DGL; the cost to be measured against."""

    def step() -> tuple[Tensor, ...]:
        training.optimizer.zero_grad()
        plain = training.plain()
        loss = F.cross_entropy(plain_head(plain, plain.features), training.target)
        loss.backward()
        training.optimizer.step()
        return (loss.detach(),)

    return step


def _two_pass(training: Training) -> Step:
    """The published recipe: two backward passes, the head's gradients dropped in between."""
    target, head_parameters = training.target, [*training.head.parameters()]

    def step() -> tuple[Tensor, ...]:
        training.optimizer.zero_grad()
        plain = training.plain()
        fused = F.cross_entropy(plain_head(plain, [h.detach() for h in plain.features]), target)
        parts = [F.cross_entropy(plain_unimodal(plain, i), target) for i in range(2)]
        (parts[0] + parts[1]).backward(retain_graph=True)
        for parameter in head_parameters:
            parameter.grad = None
        fused.backward()
        training.optimizer.step()
        return (fused.detach(), *(part.detach() for part in parts))

    return step


def _dgl_ext(training: Training) -> Step:
    """This package: one call, one backward pass."""
    head = training.head

    def step() -> tuple[Tensor, ...]:
        training.optimizer.zero_grad()
        loss = head.cross_entropy(*training.features(), target=training.target)
        loss.total.backward()
        training.optimizer.step()
        return (loss.fused, *loss.unimodal)

    return step


PROVIDERS: dict[str, Callable[[Training], Step]] = {
    "joint": _joint,
    "two_pass": _two_pass,
    "dgl_ext": _dgl_ext,
}

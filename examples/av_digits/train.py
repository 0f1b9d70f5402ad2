"""One run: a method with a seed, from the data to its measures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import DataConfig, Pairs, load_pairs
from .measure import accuracy, attenuation, features_of, probe
from .methods import METHODS, Method
from .models import Network
from .ogm_ge import apply_ogm_ge

WATCHED = 256  # training pairs on which attenuation is measured


@dataclass(frozen=True)
class TrainConfig:
    """The same for every method: plain SGD, cosine schedule to zero.

    Attributes:
        epochs: number of passes over the training pairs.
        batch: pairs of a step.
        lr: at the start.
        batch_norm: whether the encoders have BatchNorm.
    """

    epochs: int = 40
    batch: int = 64
    lr: float = 0.4
    batch_norm: bool = False


@dataclass
class Run:
    """What a run leaves: percentages, curves over epochs, and test logits for late fusion."""

    method: str
    seed: int
    fused: float
    train_fused: float
    probes: dict[str, float]
    zeroed: dict[str, float]
    grad_norms: dict[str, list[float]]
    attenuation: dict[str, list[float]]
    cpu_seconds: float
    diverged: bool  # the weights are no longer finite
    logits: Tensor = field(repr=False)

    def document(self) -> dict[str, Any]:
        """Everything but the logits, for JSON, which has no word for what is not finite."""
        document = {key: value for key, value in vars(self).items() if key != "logits"}
        for kind in ("grad_norms", "attenuation"):
            document[kind] = {
                name: [value if math.isfinite(value) else None for value in curve]
                for name, curve in document[kind].items()
            }
        return document


def gradient_norm(encoder: torch.nn.Module) -> Tensor:
    """Norm of the gradient of all of an encoder's parameters."""
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def train_network(
    network: Network, method: Method, train: Pairs, config: TrainConfig, seed: int
) -> tuple[list[list[float]], list[list[float]]]:
    """An ordinary training loop.

    Args:
        network: trained in place.
        method: its loss, and whether OGM-GE acts on the gradients.
        train: the training split.
        config: the schedule.
        seed: of the batches and of OGM-GE's noise.

    Returns:
        Per epoch and modality: the mean gradient norm of the encoder; the attenuation (empty for
        one modality).
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    batches = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    watched = Pairs(*(x[:WATCHED] for x in (train.images, train.speech, train.digits)))
    norms, ratios = [], []
    for _ in range(config.epochs):
        steps = []
        for rows in torch.randperm(len(train.digits), generator=batches).split(config.batch):
            digits = train.digits[rows]
            out = network([x[rows] for x in train.inputs])
            optimizer.zero_grad()
            method.loss(out, digits).backward()
            if method.ogm_ge is not None:
                apply_ogm_ge(network, out, digits, method.ogm_ge, noise)
            steps.append(torch.stack([gradient_norm(e) for e in network.encoders.values()]))
            optimizer.step()
        schedule.step()
        norms.append(torch.stack(steps).mean(0).tolist())
        if len(network.encoders) > 1:
            network.eval()
            ratios.append(attenuation(network, watched))
            network.train()
    return norms, ratios


def by_modality(network: Network, epochs: list[list[float]]) -> dict[str, list[float]]:
    """Curves by name from values per epoch and modality."""
    return {
        name: list(curve)
        for name, curve in zip(network.encoders, zip(*epochs, strict=True), strict=False)
    }


def run_method(name: str, seed: int, data: DataConfig, config: TrainConfig, cache: Path) -> Run:
    """Trains one network and measures it.

    Args:
        name: a key of `METHODS`.
        seed: of the data, the initial weights and the batches.
        data: sizes and noise.
        config: the schedule.
        cache: folder of the cached speech.

    Returns:
        The measures.
    """
    torch.set_num_threads(1)  # layers this small gain nothing from more
    start = time.process_time()
    method = METHODS[name]
    pairs = load_pairs(data, seed, cache)
    train, test = pairs["train"], pairs["test"]
    network = Network(
        method.modalities,
        method.fusion,
        seed,
        method.encoder_leak,
        method.head_leak,
        config.batch_norm,
    )
    norms, ratios = train_network(network, method, train, config, seed)

    network.eval()
    train_features, test_features = features_of(network, train), features_of(network, test)
    with torch.no_grad():
        out = network.head(*test_features)
        train_fused = network.head(*train_features).fused
    return Run(
        method=name,
        seed=seed,
        fused=accuracy(out.fused, test.digits),
        train_fused=accuracy(train_fused, train.digits),
        probes={
            modality: probe(train_features[i], train.digits, test_features[i], test.digits)
            for i, modality in enumerate(network.encoders)
        },
        zeroed={
            modality: accuracy(out.unimodal[i], test.digits)
            for i, modality in enumerate(network.encoders)
        },
        grad_norms=by_modality(network, norms),
        attenuation=by_modality(network, ratios),
        cpu_seconds=round(time.process_time() - start, 1),
        diverged=not all(bool(p.isfinite().all()) for p in network.parameters()),
        logits=out.fused,
    )

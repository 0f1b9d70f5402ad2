"""One job: a method with a seed, trained on all views, on every pair, and with views missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from dgl_ext.nn import ConcatFusion

from .data import CLASSES, VIEWS, Split, load_splits

# Method and label. Those that are a mode of the head come first.
METHODS = {
    "joint": "joint",
    "joint+unimodal": "joint + unimodal losses",
    "dgl": "DGL",
    "late": "late fusion",
    "untrained": "untrained encoders",
}
ALL = tuple(range(len(VIEWS)))
PAIRS = {
    f"{first} + {second}": (i, j) for (i, first), (j, second) in combinations(enumerate(VIEWS), 2)
}


@dataclass(frozen=True)
class Config:
    """The same for every method: plain SGD with momentum at a constant rate, no epoch selected."""

    train: int = 300
    test: int = 1000
    epochs: int = 60
    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    missing: float = 0.3


class Network(nn.Module):
    """An encoder for each of some views, and a concat head. The seed sets the initial weights."""

    def __init__(self, views: Sequence[int], mode: str, seed: int) -> None:
        super().__init__()
        self.views = list(views)
        widths = [width for _, width in VIEWS.values()]
        self.encoders = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            for i in self.views:
                # By view, so that an encoder starts the same in every network of a seed.
                torch.manual_seed(1000 * seed + i)
                layers = nn.Linear(widths[i], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
                self.encoders.append(nn.Sequential(*layers))
            torch.manual_seed(1000 * seed + len(VIEWS))
            self.head = ConcatFusion([32] * len(self.views), CLASSES, mode=mode)

    def features(self, views: Sequence[Tensor]) -> list[Tensor]:
        """What the head sees; `views` are all six."""
        return [encoder(views[i]) for encoder, i in zip(self.encoders, self.views, strict=True)]


def fit(views: Sequence[int], mode: str, train: Split, config: Config, seed: int) -> Network:
    """Trains a network of some views: an ordinary loop."""
    network = Network(views, mode, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=config.momentum)
    batches = torch.Generator().manual_seed(seed)
    present = train.present[:, network.views]
    # A row that has none of this network's views would train the bias alone.
    weight = present.any(1).float()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(train.digits), generator=batches).split(config.batch):
            optimizer.zero_grad()
            network.head.cross_entropy(
                *network.features([view[rows] for view in train.views]),
                target=train.digits[rows],
                present=present[rows].unbind(1),
                sample_weight=weight[rows],
            ).total.backward()
            optimizer.step()
    return network


@torch.no_grad()
def accuracy(networks: Sequence[Network], split: Split) -> float:
    """Percentage of right answers of the sum of the networks' logits; late fusion has several."""
    total = torch.zeros(len(split.digits), CLASSES)
    for network in networks:
        present = split.present[:, network.views]
        out = network.head(*network.features(split.views), present=present.unbind(1))
        # Where a network has no input, it answers with its bias, which would only add noise.
        total += out.fused * present.any(1, keepdim=True)
    return 100 * (total.argmax(1) == split.digits).double().mean().item()


@torch.no_grad()
def probes(networks: Sequence[Network], train: Split, test: Split) -> dict[str, float]:
    """Ridge classifiers on frozen features, by view; standardised, so that scale counts nothing."""
    found = {}
    for network in networks:
        features = network.features(train.views), network.features(test.views)
        for i, seen, unseen in zip(network.views, *features, strict=True):
            probe = make_pipeline(StandardScaler(), RidgeClassifier())
            probe.fit(seen.numpy(), train.digits.numpy())
            found[list(VIEWS)[i]] = 100 * probe.score(unseen.numpy(), test.digits.numpy())
    return found


def run(
    method: str, seed: int, config: Config, cache: Path, pairs: Sequence[str]
) -> dict[str, Any]:
    """Everything that is measured of a method with a seed, in percent."""
    torch.set_num_threads(1)  # layers this small gain nothing from more

    def trained(views: Sequence[int], split: Split) -> list[Network]:
        if method == "untrained":
            return [Network(views, "joint", seed)]
        if method == "late":
            return [fit([i], "joint", split, config, seed) for i in views]
        return [fit(views, method, split, config, seed)]

    train, test = load_splits(cache, seed, config.train, config.test, 0)
    whole = trained(ALL, train)
    result = {"method": method, "seed": seed, "probes": probes(whole, train, test), "fused": {}}
    if method == "untrained":
        return result  # the head, too, is untrained
    result["fused"]["all"] = accuracy(whole, test)
    for pair in pairs:
        views = PAIRS[pair]
        # Late fusion trains nothing for a pair: it has its encoders already.
        networks = [whole[i] for i in views] if method == "late" else trained(views, train)
        result["fused"][pair] = accuracy(networks, test)
    train, test = load_splits(cache, seed, config.train, config.test, config.missing)
    result["fused"]["missing"] = accuracy(trained(ALL, train), test)
    return result

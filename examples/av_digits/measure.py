"""What is measured of a network: accuracies, linear probes, attenuation."""

from __future__ import annotations

import copy

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy

from .data import Pairs
from .models import Network

BATCH = 256


@torch.no_grad()
def features_of(network: Network, pairs: Pairs) -> list[Tensor]:
    """Features of all pairs, one tensor per modality."""
    rows = torch.arange(len(pairs.digits)).split(BATCH)
    parts = [network.features([x[some] for x in pairs.inputs]) for some in rows]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def accuracy(logits: Tensor, digits: Tensor) -> float:
    """Share of right answers, in percent."""
    return 100 * (logits.argmax(1) == digits).double().mean().item()


def probe(train: Tensor, train_digits: Tensor, test: Tensor, test_digits: Tensor) -> float:
    """Test accuracy in percent of a linear classifier trained on an encoder's features.

    Of an encoder that diverged it is that of the most frequent answer: there is nothing to learn.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        return 100 * (test_digits == train_digits.mode().values).double().mean().item()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    with threadpool_limits(1):  # every core has a run of its own
        classifier.fit(train.numpy(), train_digits.numpy())
        return 100 * float(classifier.score(test.numpy(), test_digits.numpy()))


def attenuation(network: Network, pairs: Pairs) -> list[float]:
    """How much smaller the multimodal gradient is than the unimodal one, per modality.

    The norm of the gradient that the fused loss has at feature i, over that of the gradient that
    its own unimodal loss has there, both through the present head. It is taken whether or not
    training lets the fused loss pass: for DGL it tells what the encoders would get.

    Args:
        network: with two or more encoders.
        pairs: where to measure.

    Returns:
        One ratio per modality.
    """
    # Shares the parameters; only here does the fused loss reach the features.
    head = copy.copy(network.head)
    head.encoder_leak = 1.0
    features = [feature.requires_grad_() for feature in features_of(network, pairs)]
    out = head(*features)
    fused = torch.autograd.grad(cross_entropy(out.fused, pairs.digits), features, retain_graph=True)
    ratios = []
    for i, logits in enumerate(out.unimodal):
        (unimodal,) = torch.autograd.grad(
            cross_entropy(logits, pairs.digits), features[i], retain_graph=True
        )
        ratios.append((fused[i].norm() / unimodal.norm()).item())
    return ratios

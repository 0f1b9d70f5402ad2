"""OGM-GE, written from the equations of the paper.

Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
CVPR 2022. The encoder of the modality that is ahead gets a smaller gradient (OGM), and noise with
the deviation of the gradient is added to both (GE).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dgl_ext.types import DecoupledLogits

from .models import Network


def scores(out: DecoupledLogits, bias: Tensor, digits: Tensor) -> Tensor:
    """Per modality, the sum over the batch of the probability that it gives to the right class.

    The logits of one modality are `h_i W_i^T + b / M`: the paper divides the shared bias.

    Args:
        out: outputs of a concat head, whose unimodal logits hold the whole bias.
        bias: of the head.
        digits: (N,) right classes.

    Returns:
        (M,)
    """
    surplus = bias * (1 - 1 / len(out.unimodal))
    right = [(z - surplus).softmax(1).gather(1, digits[:, None]).sum() for z in out.unimodal]
    return torch.stack(right)


def coefficients(batch_scores: Sequence[float], alpha: float) -> list[float]:
    """The factor k of each of two encoders' gradients.

    With rho = (own score) / (the other's): `1 - tanh(alpha * rho)` where rho > 1, otherwise 1.
    """
    first, second = batch_scores
    ratios = (first / second, second / first)
    return [1 - math.tanh(alpha * rho) if rho > 1 else 1.0 for rho in ratios]


def modulate(parameters: Iterable[nn.Parameter], k: float, generator: torch.Generator) -> None:
    """Scales the gradients of convolution kernels by k and adds noise, in place.

    The noise of a kernel is Gaussian; its deviation is that of the kernel's gradient over its
    elements, which stands in for the covariance of the stochastic gradient.
    """
    for parameter in parameters:
        if parameter.ndim != 4 or parameter.grad is None:
            continue
        grad = parameter.grad
        noise = torch.empty_like(grad).normal_(generator=generator) * grad.std()
        grad.mul_(k).add_(noise)


def apply_ogm_ge(
    network: Network,
    out: DecoupledLogits,
    digits: Tensor,
    alpha: float,
    generator: torch.Generator,
) -> None:
    """Modulates the encoders' gradients; call it between `backward()` and the optimizer's step."""
    with torch.no_grad():
        batch_scores = scores(out, network.head.bias, digits).tolist()
        factors = coefficients(batch_scores, alpha)
        for encoder, k in zip(network.encoders.values(), factors, strict=True):
            modulate(encoder.parameters(), k, generator)

"""Training modes by name: which leaks and which alpha each one stands for."""

from __future__ import annotations

from typing import NamedTuple

from .validate import check_choice, check_share


class Mode(NamedTuple):
    """What a mode sets where the user gives no number.

    Attributes:
        encoder_leak: the share of the fused branch's gradient that the features receive.
        head_leak: the share of the unimodal branches' gradients that the head receives.
        alpha: what each unimodal loss is multiplied by.
    """

    encoder_leak: float
    head_leak: float
    alpha: float


MODES = {
    "dgl": Mode(0.0, 0.0, 1.0),
    "joint": Mode(1.0, 0.0, 0.0),
    "joint+unimodal": Mode(1.0, 1.0, 1.0),
}


def get_mode(mode: object) -> Mode:
    """Returns what the mode of that name sets."""
    return MODES[check_choice("mode", mode, MODES)]


def check_leaks(mode: object, encoder_leak: object, head_leak: object) -> tuple[float, float]:
    """Returns both leaks: as given, or where that is None as the mode sets them."""
    preset = get_mode(mode)
    return (
        preset.encoder_leak if encoder_leak is None else check_share("encoder_leak", encoder_leak),
        preset.head_leak if head_leak is None else check_share("head_leak", head_leak),
    )

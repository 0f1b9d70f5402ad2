"""What FlopCounterMode counts: the products that each op makes, no more than the reference."""

from __future__ import annotations

import pytest
import torch
from support.problems import cotangents_like, flat, loss_gradients, make_problem, make_target
from torch.utils.flop_counter import FlopCounterMode

import dgl_ext

ROWS, X, Y, CLASSES = 6, 4, 3, 5
OUT_X, OUT_Y = (2 * ROWS * CLASSES * width for width in (X, Y))
OUT = OUT_X + OUT_Y
FILM_OUT, FILM = OUT_Y, 2 * ROWS * X * 2 * Y


def counted(fusion: str, mode: str, backend: str = "auto", frozen: tuple = (), **options) -> int:
    problem = make_problem(
        fusion, leading=(2, 3), widths=(X, Y), classes=CLASSES, dtype=torch.float32
    )
    for i in frozen:
        problem.features[i].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        if mode == "step":
            loss = problem.step(
                dgl_ext.fused_decouple_cross_entropy,
                make_target(problem),
                backend=backend,
                **options,
            )
            loss_gradients(loss, problem)
        else:
            logits = problem.call(dgl_ext.fused_decouple, backend=backend, **options)
            if mode == "backward":
                torch.autograd.backward(flat(logits), cotangents_like(logits))
    return counter.get_total_flops()


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_linear_heads(fusion):
    assert counted(fusion, "forward") == OUT
    assert counted(fusion, "backward") == counted(fusion, "step") == 3 * OUT
    assert counted(fusion, "step", frozen=(0,)) == 3 * OUT - OUT_X
    assert counted(fusion, "step", frozen=(0, 1)) == 2 * OUT
    assert counted(fusion, "backward", "reference") == 4 * OUT  # the unimodal logits anew


def test_film():
    forward = FILM + 3 * FILM_OUT
    backward = FILM + FILM // 2 + 4 * FILM_OUT
    assert counted("film", "forward") == forward
    assert counted("film", "backward") == counted("film", "step") == forward + backward
    of_x = FILM // 2 + FILM_OUT
    assert counted("film", "step", frozen=(0,)) == forward + backward - of_x
    leaking = forward + backward + FILM // 2
    assert counted("film", "backward", encoder_leak=0.5) == leaking
    assert counted("film", "step", encoder_leak=0.5) == leaking
    reference = counted("film", "backward", "reference")
    assert reference == forward + backward + FILM // 2  # beta of x anew

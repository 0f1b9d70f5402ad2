"""A step's result in the hands of a training loop, and training modes by name."""

from __future__ import annotations

import pytest
import torch
from support.grids import one_axis_at_a_time
from support.problems import (
    BACKENDS,
    assert_same,
    cotangents_like,
    gradients,
    loss_gradients,
    make_problem,
    make_target,
)

import dgl_ext
from dgl_ext.diagnostics import attenuation, routing

# mode: (encoder_leak, head_leak, alpha)
MODES = {"dgl": (0.0, 0.0, 1.0), "joint": (1.0, 0.0, 0.0), "joint+unimodal": (1.0, 1.0, 1.0)}


def step(problem, **options):
    target = make_target(problem, ignored=0.3)
    return problem.step(dgl_ext.fused_decouple_cross_entropy, target, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_is_flat_and_detached(fusion, backend):
    loss = step(make_problem(fusion), backend=backend)
    log = loss.log(["audio", "video"])
    accuracy = loss.correct / loss.count
    expected = {
        "loss/total": loss.total, "loss/fused": loss.fused, "loss/audio": loss.unimodal[0],
        "loss/video": loss.unimodal[1], "accuracy/fused": accuracy[0],
        "accuracy/audio": accuracy[1], "accuracy/video": accuracy[2],
    }  # fmt: skip
    assert log.keys() == expected.keys()
    assert_same(log, expected, 0.0)
    assert not any(value.requires_grad or value.dim() for value in log.values())
    assert list(loss.log())[2:4] == ["loss/modality_0", "loss/modality_1"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["audio"], ValueError, "names: expected 2, one per modality, got 1"),
        ("av", TypeError, "names: expected a sequence of str, got 'av'"),
        ([1, 2], TypeError, r"names: expected a sequence of str, got \[1, 2\]"),
        (["a", "a"], ValueError, r"names: expected each once, .*, got \['a', 'a'\]"),
        (["fused", "a"], ValueError, r'no "fused" or "total", got \[.fused., .a.\]'),
        (["a", "total"], ValueError, r'no "fused" or "total", got \[.a., .total.\]'),
    ],
)
def test_names_that_do_not_fit(names, error, message):
    with pytest.raises(error, match=message):
        step(make_problem("sum")).log(names)


@pytest.mark.parametrize(
    "use",
    [
        lambda loss: loss / 2,
        lambda loss: loss * 2,
        lambda loss: 0.5 * loss,
        lambda loss: loss + loss,
        lambda loss: sum([loss, loss]),
        lambda loss: 1 - loss,
        lambda loss: -loss,
        lambda loss: loss**2,
        lambda loss: loss < 1.0,
        lambda loss: f"{loss:.3f}",
        float,
        round,
        lambda loss: loss.item(),
        lambda loss: loss.detach(),
        lambda loss: torch.autograd.grad(loss, [torch.ones(1, requires_grad=True)]),
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.isfinite(loss),
    ],
)
def test_the_whole_taken_for_a_scalar_names_the_total(use):
    with pytest.raises((TypeError, AttributeError), match=r"`?\.total`?"):
        use(step(make_problem("concat")))


@pytest.mark.parametrize("backend", BACKENDS)
@one_axis_at_a_time(mode=list(MODES), given=[{}, {"encoder_leak": 0.5}, {"head_leak": 0.25}])
def test_a_mode_sets_what_is_not_given(fusion, backend, mode, given):
    problem = make_problem(fusion)
    encoder_leak, head_leak, alpha = MODES[mode]
    numbers = {"encoder_leak": encoder_leak, "head_leak": head_leak, **given}
    pair = [
        step(problem, mode=mode, backend=backend, **given),
        step(problem, alpha=alpha, backend=backend, **numbers),
    ]
    found, expected = ({"total": loss.total, **loss_gradients(loss, problem)} for loss in pair)
    assert_same(found, expected, 0.0)
    weighed = step(problem, mode=mode, alpha=3.0, backend=backend)
    assert_same({"total": weighed.total}, {"total": weighed.fused + 3 * sum(weighed.unimodal)})

    logits = problem.call(dgl_ext.fused_decouple, mode=mode, backend=backend, **given)
    cotangents = cotangents_like(logits)
    found = gradients(logits, problem, cotangents)
    logits = problem.call(dgl_ext.fused_decouple, backend=backend, **numbers)
    assert_same(found, gradients(logits, problem, cotangents), 0.0)


def test_joint_is_the_plain_head(fusion):
    """Every gradient is that of the fused loss alone."""
    problem = make_problem(fusion)
    found = loss_gradients(step(problem, mode="joint"), problem)
    logits = problem.call(dgl_ext.fused_decouple, mode="joint+unimodal", backend="reference")
    target = make_target(problem, ignored=0.3)
    plain = torch.nn.functional.cross_entropy(logits.fused, target)
    named = dict(problem.named())
    expected = torch.autograd.grad(plain, list(named.values()))
    assert_same(found, dict(zip(named, expected, strict=True)), 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_modules_take_modes(fusion, mode):
    module = dgl_ext.nn.MODULES[fusion]((5, 4), 3, mode=mode)
    assert (module.encoder_leak, module.head_leak) == MODES[mode][:2]
    features, target = (torch.randn(7, 5), torch.randn(7, 4)), torch.randint(3, (7,))
    loss = module.cross_entropy(*features, target=target)
    assert torch.allclose(loss.total, loss.fused + MODES[mode][2] * sum(loss.unimodal))
    assert (f"mode='{mode}'" in repr(module)) == (mode != "dgl")
    assert "leak" not in repr(module)
    assert "encoder_leak=0.5" in repr(dgl_ext.nn.MODULES[fusion]((5, 4), 3, encoder_leak=0.5))
    module = dgl_ext.nn.Decoupled(torch.nn.Bilinear(5, 4, 3), mode=mode)
    assert (module.encoder_leak, module.head_leak) == MODES[mode][:2]


def test_a_mode_that_is_assigned_sets_what_it_sets_when_made(fusion):
    features = [torch.randn(7, width, requires_grad=True) for width in (5, 4)]
    target = torch.randint(3, (7,))
    modules = [
        dgl_ext.nn.MODULES[fusion]((5, 4), 3, encoder_leak=0.5),
        dgl_ext.nn.Decoupled(torch.nn.Bilinear(5, 4, 3), head_leak=0.5),
    ]
    for module in modules:
        module.mode = "joint"
        assert (module.mode, module.encoder_leak, module.head_leak) == ("joint", 1.0, 0.0)
        with pytest.raises(ValueError, match=r'mode: expected one of "dgl", .*, got .udml.'):
            module.mode = "udml"
        assert module.mode == "joint"
    loss = modules[0].cross_entropy(*features, target=target)
    assert torch.equal(loss.total, loss.fused)
    assert all(grad.any() for grad in torch.autograd.grad(loss.total, features))


@pytest.mark.parametrize("name", ["mode", "encoder_leak", "backend", "fusion", "smoothing"])
def test_a_call_takes_the_options_of_the_loss_alone(name):
    head = dgl_ext.nn.ConcatFusion((5, 4), 3)
    batch = {"target": torch.randint(3, (7,)), name: "joint"}
    with pytest.raises(
        TypeError, match=rf"^{name}: expected an option of the loss \(alpha, class_w"
    ):
        head(torch.randn(7, 5), torch.randn(7, 4), **batch)


@pytest.mark.parametrize("mode", ["udml", None, 1])
def test_no_such_mode(mode):
    for make in (dgl_ext.nn.SumFusion, dgl_ext.nn.Decoupled):
        arguments = (torch.nn.ReLU(),) if make is dgl_ext.nn.Decoupled else ((5, 4), 3)
        with pytest.raises(ValueError, match='mode: expected one of "dgl", "joint", "joint'):
            make(*arguments, mode=mode)


def test_one_loss_fn_serves_both_diagnostics():
    head = dgl_ext.nn.ConcatFusion((5, 4), 3)
    features, target = (torch.randn(7, 5), torch.randn(7, 4)), torch.randint(3, (7,))

    def loss_fn(head, features):
        out = head(*features)
        outputs = dict(zip(("fused", "audio", "video"), (out.fused, *out.unimodal), strict=True))
        return {k: torch.nn.functional.cross_entropy(z, target) for k, z in outputs.items()}

    assert routing(head, features, loss_fn).reached_by("fused") == ["linear.weight", "linear.bias"]
    assert attenuation(head, features, loss_fn).ratio.shape == (2,)

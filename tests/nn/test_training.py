"""Whole training loops in one process: the heads behave there as any other layer."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from support.problems import assert_same, assert_two_references
from support.training import (
    CASES,
    CLASSES,
    WIDTHS,
    TwoModalities,
    batches,
    grads,
    sgd,
    train,
    values,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import dgl_ext

IDS = ["-".join(case) for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)
KERNELS = [case for case in CASES if case[0] in dgl_ext.nn.MODULES]
each_head = pytest.mark.parametrize("case", KERNELS, ids=["-".join(case) for case in KERNELS])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients_of(model: nn.Module, *data) -> dict[str, Tensor | None]:
    """Every `.grad` after a backward pass through the total of each batch."""
    model.zero_grad()
    for batch in data:
        model(*batch).backward()
    return grads(model)


@each_head
class TestAmp:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_is_no_less_exact_than_the_reference(self, case, dtype):
        """What the head hands to its parameters and to the encoders, which only pass it on."""
        scale = 1024.0 if dtype == torch.float16 else 1.0
        ((x, y, target),) = batches(1, rows=64)

        def found(backend: str, exact: bool = False) -> dict[str, Tensor]:
            model = TwoModalities(*case, backend=backend)
            with torch.autocast("cpu", dtype):
                features = model.features(x, y)
                if not exact:
                    total = model.loss(*features, target=target)
            assert {h.dtype for h in features} == {dtype}
            if exact:  # float64 from what autocast rounds on the way into the head
                features = [h.detach().double().requires_grad_() for h in features]
                for parameter in model.head.parameters():
                    parameter.data = parameter.to(dtype).double()
                total = model.loss(*features, target=target)
            tensors = {f"features[{i}]": h for i, h in enumerate(features)}
            tensors |= dict(model.head.named_parameters())
            results = torch.autograd.grad(total * scale, list(tensors.values()))
            return dict(zip(tensors, results, strict=True))

        truth = found("reference", exact=True)
        assert_two_references(found("auto"), found("reference"), truth)

    def test_every_gradient_under_autocast_is_near_that_in_float32(self, case):
        (batch,) = batches(1, rows=64)
        model = TwoModalities(*case)
        expected = gradients_of(model, batch)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = model(*batch)
        assert total.dtype == torch.float32
        total.backward()
        assert_same(grads(model), expected, 2**-7)

    def test_a_scaled_loop_takes_the_steps_of_the_plain_one(self, case):
        """A power of two as the scale rounds nothing, so float32 steps must be the same."""
        plain, scaled = TwoModalities(*case), TwoModalities(*case)
        train(plain, batches(5))
        optimizer, scaler = sgd(scaled), torch.amp.GradScaler("cpu", init_scale=256.0)
        for batch in batches(5):
            optimizer.zero_grad()
            scaler.scale(scaled(*batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 256
        assert_same(values(scaled), values(plain), 1e-6)

    def test_an_overflow_skips_the_step(self, case):
        model = TwoModalities(*case)
        before = values(model)
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**30)
        with torch.autocast("cpu", torch.float16):
            total = model(*next(batches(1)))
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**29
        assert_same(values(model), before, 0)


@pytest.mark.parametrize("head", list(dgl_ext.nn.MODULES))
def test_the_loss_method_trains_as_the_logits_do(head):
    by_logits, by_loss = TwoModalities(head, "logits"), TwoModalities(head, "loss")
    for model in (by_logits, by_loss):
        train(model, batches(20))
    assert_same(values(by_loss), values(by_logits), 1e-6)


@each_case
def test_four_micro_batches_equal_one_batch(case):
    model = TwoModalities(*case)
    (batch,) = batches(1, rows=32)
    whole = gradients_of(model, batch)
    micro = zip(*(part.split(8) for part in batch), strict=True)
    model.zero_grad()
    for part in micro:
        (model(*part) / 4).backward()
    assert_same(grads(model), whole, 1e-6)


@each_case
def test_clipping_sees_every_gradient(case):
    model = TwoModalities(*case)
    before = gradients_of(model, *batches(1))
    norm = torch.stack([grad.norm() for grad in before.values()]).norm()
    bound = 0.1 * float(norm)
    clipped = {name: 0.1 * grad for name, grad in before.items()}
    found = nn.utils.clip_grad_norm_(model.parameters(), bound)
    assert float(found) == pytest.approx(float(norm), rel=1e-6)
    assert_same(grads(model), clipped, 1e-5)


class Checkpointed(TwoModalities):
    """Recomputes the encoders in backward."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        return [
            checkpoint(encoder, x, use_reentrant=False)
            for encoder, x in zip(self.encoders, inputs, strict=True)
        ]


@each_case
def test_checkpointing_changes_nothing(case):
    (batch,) = batches(1)
    model = TwoModalities(*case)
    expected = gradients_of(model, batch)
    assert_same(gradients_of(Checkpointed(*case), batch), expected, 0)

    # The head, too, in the region; and a total that is scaled, which a loss's gradients wait for.
    model.zero_grad()
    (checkpoint(model, *batch, use_reentrant=False) * 3).backward()
    assert_same(grads(model), {name: 3 * grad for name, grad in expected.items()}, 1e-6)


@each_case
def test_a_reentrant_region_that_returns_the_total(case):
    """A region of the older kind may only return tensors, so the loss is taken within."""
    (batch,) = batches(1)
    model = TwoModalities(*case)
    expected = gradients_of(model, batch)
    x, y, target = batch
    model.zero_grad()
    checkpoint(model, x.requires_grad_(), y, target, use_reentrant=True).backward()
    assert_same(grads(model), expected, 1e-6)


def test_a_reentrant_region_that_returns_logits_trains_no_encoder():
    """Why docs/training.md says to use the other kind: gradients do not pass a nested tuple."""
    model = TwoModalities("concat", "logits")
    ((x, y, _),) = batches(1)

    def region(x: Tensor, y: Tensor) -> dgl_ext.DecoupledLogits:
        return model.head(*model.features(x, y))

    fused, unimodal = checkpoint(region, x.requires_grad_(), y, use_reentrant=True)
    assert fused.requires_grad
    assert not any(z.requires_grad for z in unimodal)
    fused, unimodal = checkpoint(region, x, y, use_reentrant=False)
    assert all(z.requires_grad for z in (fused, *unimodal))


@each_case
def test_compile_of_a_whole_model(case):
    model = TwoModalities(*case)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    counts = []
    for rows in (8, 11, 17):
        (batch,) = batches(1, rows=rows)
        expected = gradients_of(model, batch)
        model.zero_grad()
        compiled(*batch).backward()
        assert_same(grads(model), expected, 1e-6)
        counts.append(frames.frame_count)
    assert counts == [1, 2, 2]  # for one size, then for any


@each_head
def test_an_alpha_schedule_under_compile(case):
    """A new number is a new constant for `.cross_entropy`; a tensor for logits is an input."""
    head, mode = case
    model = TwoModalities(head, mode)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, y: Tensor, target: Tensor, alpha: float | Tensor) -> Tensor:
        features = model.features(x, y)
        if mode == "loss":
            return model.head.cross_entropy(*features, target=target, alpha=alpha).total
        fused, unimodal = model.head(*features)
        rest = sum(nn.functional.cross_entropy(z, target) for z in unimodal)
        return nn.functional.cross_entropy(fused, target) + alpha * rest

    compiled = torch.compile(loss, fullgraph=True, backend=frames)
    (batch,) = batches(1)
    for alpha in (1.0, 2.5, 4.0, 0.0):
        given = alpha if mode == "loss" else torch.tensor(alpha)
        expected = torch.autograd.grad(loss(*batch, given), list(model.parameters()))
        found = torch.autograd.grad(compiled(*batch, given), list(model.parameters()))
        names = list(values(model))
        assert_same(
            dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), 1e-6
        )
    counts = {"logits": 1, "loss": 4}
    # One compilation more where the number first was thought to be the only one that changes.
    assert counts[mode] <= frames.frame_count <= counts[mode] + 1


def saved(model: nn.Module) -> nn.Module:
    """A copy through `torch.save` of the whole module."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
}


@pytest.mark.parametrize("make_copy", list(COPIES.values()), ids=list(COPIES))
@each_case
def test_a_copy_trains_on_as_the_original_does(case, make_copy):
    model = TwoModalities(*case)
    train(model, batches(2))
    twin = make_copy(model)
    before = values(model)
    train(twin, batches(3, seed=4))
    assert_same(values(model), before, 0)
    train(model, batches(3, seed=4))
    assert_same(values(twin), values(model), 0)


@each_case
def test_a_checkpoint_resumes(case):
    model = TwoModalities(*case)
    optimizer = sgd(model)
    data = list(batches(6))

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for batch in data[part]:
            optimizer.zero_grad()
            module(*batch).backward()
            optimizer.step()

    steps(model, optimizer, slice(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    resumed = TwoModalities(*case, seed=5)
    resumed.load_state_dict(state["model"])
    fresh = sgd(resumed)
    fresh.load_state_dict(state["optimizer"])
    for module, opt in ((model, optimizer), (resumed, fresh)):
        steps(module, opt, slice(3, None))
    assert_same(values(resumed), values(model), 0)


@each_case
def test_a_moving_average_of_the_weights(case):
    model = TwoModalities(*case)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)  # the first takes the values as they are
    expected = values(model)
    for batch in batches(4):
        train(model, [batch])
        average.update_parameters(model)
        now = values(model)
        expected = {name: 0.9 * mean + 0.1 * now[name] for name, mean in expected.items()}
    assert_same(values(average.module), expected, 1e-6)
    (batch,) = batches(1)
    assert torch.isfinite(average(*batch))


def test_the_state_of_a_plain_head_loads_and_goes_back():
    plain = nn.Linear(sum(WIDTHS), CLASSES)
    head = dgl_ext.nn.ConcatFusion(WIDTHS, CLASSES)
    head.load_state_dict(plain.state_dict())
    x, y = torch.randn(6, WIDTHS[0]), torch.randn(6, WIDTHS[1])
    torch.testing.assert_close(head(x, y).fused, plain(torch.cat([x, y], dim=1)))
    train_one = partial(nn.functional.cross_entropy, target=torch.randint(CLASSES, (6,)))
    train_one(head(x, y).fused).backward()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter -= parameter.grad
    plain.load_state_dict(head.linear.state_dict())
    torch.testing.assert_close(head(x, y).fused, plain(torch.cat([x, y], dim=1)))


@each_head
def test_a_hook_of_the_head_runs_in_both_modes(case):
    model = TwoModalities(*case)
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append(1))
    model(*next(batches(1)))
    assert len(calls) == 1

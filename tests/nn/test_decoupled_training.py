"""`Decoupled` within what a training script does with modules: compiled, cast, copied, sharded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fusion_modules import (
    Concat,
    Imputer,
    NormedMLP,
    grads_of,
    make,
    outputs_like,
    run,
    substituted,
)
from support.problems import assert_same, cotangents_like
from support.two_pass import named_logits
from torch import nn
from torch.utils.checkpoint import checkpoint

import dgl_ext
from dgl_ext.nn.decoupled import Decoupled


def test_checkpointing_around_it_works_and_inside_it_raises():
    module, features = make("exchange")
    cotangents = outputs_like(module, features)
    expected, expected_grads = run(module, features, cotangents)
    out, grads = run(
        module, features, cotangents, call=lambda *x: checkpoint(module, *x, use_reentrant=False)
    )
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, expected_grads, 1e-12)

    class Inside(Concat):
        def forward(self, *features):
            return checkpoint(super().forward, *features, use_reentrant=False)

    torch.manual_seed(0)
    features = [torch.randn(6, n, requires_grad=True) for n in (5, 4)]
    z = Decoupled(Inside())(*features).unimodal[0]
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        z.backward(torch.randn_like(z))


def test_state_dict_is_the_module_s_with_a_prefix():
    module, _ = make("batch-norm", substitute="self")
    plain = NormedMLP().double().state_dict()
    assert list(module.state_dict()) == [f"fusion.{name}" for name in plain]
    module.fusion.load_state_dict(plain)
    assert torch.equal(module.state_dict()["fusion.layers.0.weight"], plain["layers.0.weight"])


@pytest.mark.parametrize("case", ["transformer", "exchange", "batch-norm", "tied", "two-names"])
def test_copies_and_pickles(case):
    module, features = make(case, head_leak=0.5)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    cotangents = outputs_like(module, features)
    out, grads = run(module, features, cotangents)
    for twin in twins:
        other, other_grads = run(twin, features, cotangents)
        assert_same(named_logits(other), named_logits(out), 0.0)
        assert_same(other_grads, grads, 0.0)


@pytest.mark.parametrize("leaks", [(0.0, 0.0), (0.5, 0.25)], ids=str)
@pytest.mark.parametrize(
    "case", ["concat", "transformer", "exchange", "batch-norm", "tied", "two-names"]
)
def test_compiles_to_one_graph(case, leaks):
    torch._dynamo.reset()
    module, features = make(case, encoder_leak=leaks[0], head_leak=leaks[1])
    twin = copy.deepcopy(module)
    cotangents = outputs_like(module, features)
    expected, expected_grads = run(twin, features, cotangents)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, grads = run(module, features, cotangents, call=compiled)
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, expected_grads, 1e-12)
    buffers, expected_buffers = (dict(m.named_buffers()) for m in (module, twin))
    assert_same(buffers, expected_buffers, 1e-12)
    torch._dynamo.reset()


def test_compiles_with_masks_and_a_function():
    torch._dynamo.reset()
    module, features = make("concat", substitute=lambda h, i: [h[i] if i == j else h[j] * 2
                                                               for j in range(2)])  # fmt: skip
    present = [torch.tensor([True, False] * 3), None]
    cotangents = outputs_like(module, features)
    expected, expected_grads = run(
        module, features, cotangents, call=lambda *x: module(*x, present=present)
    )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, grads = run(module, features, cotangents, call=lambda *x: compiled(*x, present=present))
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(grads, expected_grads, 1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["transformer", "exchange"])
def test_autocast_casts_as_it_does_for_the_module(case):
    module, features = make(case, torch.float32)
    twin = copy.deepcopy(module.fusion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*features)
        fused = twin(*features)
        alone = [twin(*substituted(features, i)) for i in range(2)]
    expected = dgl_ext.DecoupledLogits(fused, tuple(alone))
    assert out.fused.dtype == torch.bfloat16
    assert_same(named_logits(out), named_logits(expected), 0.0)
    # Casts that autocast keeps must not join the passes.
    torch.autograd.backward(out.unimodal, cotangents_like(out)[1:])
    grads = grads_of(module.fusion, features)
    assert [n for n, g in grads.items() if g is not None] == ["features[0]", "features[1]"]


def test_autocast_and_a_module_as_substitute():
    module, features = make("concat", torch.float32, substitute=Imputer(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(*features)
        z = module.substitute.to_b(features[0])  # trained elsewhere, in the same region
    z.backward(torch.randn_like(z))
    assert module.substitute.to_b.weight.grad is not None


def test_a_trained_step_of_adamw_decays_nothing_that_no_loss_used():
    module, features = make("concat")
    before = module.fusion.linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.5)
    out = module(*features)
    torch.autograd.backward(out.unimodal, cotangents_like(out)[1:])
    optimizer.step()
    assert torch.equal(module.fusion.linear.weight, before)


def test_data_parallel_around_the_model(one_process):
    module, features = make("exchange")
    cotangents = outputs_like(module, features)
    _, expected = run(module, features, cotangents)
    parallel = nn.parallel.DistributedDataParallel(module)
    for _ in range(2):
        assert_same(run(module, features, cotangents, call=parallel)[1], expected, 1e-12)


def test_sharded_as_a_unit_it_works_and_inside_it_is_refused(one_process):
    from torch.distributed.fsdp import fully_shard

    module, features = make("transformer")
    cotangents = outputs_like(module, features)
    _, expected = run(module, features, cotangents)
    sharded = copy.deepcopy(module)
    fully_shard(sharded)
    for _ in range(2):
        _, grads = run(sharded, features, cotangents)
        whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
        assert_same(whole, expected, 1e-12)

    for part, message in (("layer", '"layer", a part of it'), ("", "on it; call it on the Decoup")):
        inside = copy.deepcopy(module)
        fully_shard(inside.fusion.get_submodule(part))
        with pytest.raises(ValueError, match=f"fusion: expected no sharding within, .*{message}"):
            inside(*features)

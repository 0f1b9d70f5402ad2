"""What the passes of `Decoupled` share, and leave behind: in the module, features and threads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from fusion_modules import InPlace, NormedMLP, grads_of, make, outputs_like, recipe, run
from support.problems import assert_same, flat
from support.two_pass import named_logits
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from dgl_ext.nn.decoupled import Cat, Decoupled


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


# --- parts and tensors under several names ---


@pytest.mark.parametrize("case", ["two-names", "tied", "batch-norm", "recurrent"])
def test_a_module_holds_what_it_held(case):
    module, features = make(case)
    before = named_tensors(module)
    for _ in range(3):
        run(module, features, outputs_like(module, features))
        after = named_tensors(module)
        assert list(after) == list(before)
        assert all(after[name] is tensor for name, tensor in before.items())


def test_parts_under_two_names_train_in_every_step():
    module, features = make("two-names")
    twin = copy.deepcopy(module.fusion)
    cotangents = outputs_like(module, features)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, twin)]
    for _ in range(3):
        out, grads = run(module, features, cotangents)
        expected, expected_grads, buffers = recipe(twin, features, cotangents)
        assert_same(named_logits(out), named_logits(expected), 1e-12)
        assert_same(grads, expected_grads, 1e-12)
        assert all(grad is not None for grad in grads.values())
        assert_same(dict(module.fusion.named_buffers()), buffers, 1e-12)
        for optimizer, own in zip(optimizers, (grads, expected_grads), strict=True):
            named = dict((module.fusion if own is grads else twin).named_parameters())
            for name, parameter in named.items():
                parameter.grad = own[name]
            optimizer.step()
            optimizer.zero_grad()


def test_flattened_weights_of_a_recurrent_layer_are_its_parameters():
    module, features = make("recurrent")
    module(*features)
    gru = module.fusion.gru
    assert all(w is getattr(gru, n) for n, w in zip(gru._flat_weights_names, gru._flat_weights,
                                                    strict=True))  # fmt: skip


def replica_of(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for another GPU: attributes in place of parameters."""
    replicas = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in part._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in part._parameters.items():
            replica._former_parameters[name] = parameter.clone()
            setattr(replica, name, replica._former_parameters[name])
        for name, buffer in part._buffers.items():
            replica._buffers[name] = buffer.clone()
    return replicas[module]


@pytest.mark.parametrize("case", ["exchange", "batch-norm"])
def test_a_replica_of_data_parallel(case):
    module, features = make(case)
    cotangents = outputs_like(module, features)
    out, grads = run(replica_of(module), features, cotangents)
    found = {**grads, **{name: p.grad for name, p in module.fusion.named_parameters()}}
    module.zero_grad()
    expected, expected_grads = run(module, features, cotangents)
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    assert_same(found, expected_grads, 1e-12)


# --- fusions that write to their inputs ---


def inputs(kind: str) -> list[torch.Tensor]:
    base = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if kind == "expanded":
        return [base[0], torch.randn(4, dtype=torch.float64, requires_grad=True).expand(6, 4)]
    return base if kind == "leaves" else [base[0] * 1, torch.cat([base[1]] * 2, dim=1)[:, 2:6]]


@pytest.mark.parametrize("kind", ["leaves", "expanded", "computed"])
@pytest.mark.parametrize("way", ["add", "relu", "view", "data"])
@pytest.mark.parametrize("substitute", ["zero", "self", "swap"])
def test_an_in_place_fusion_is_as_one_out_of_place(way, kind, substitute):
    if substitute == "swap":  # other features as they are

        def substitute(h, i):
            return [h[0], h[1]]

    torch.manual_seed(0)
    module = Decoupled(InPlace(way).double(), substitute, encoder_leak=0.25, head_leak=0.5)
    plain = copy.deepcopy(module)
    plain.fusion.inplace = False
    features = inputs(kind)
    kept = [h.detach().clone() for h in features]
    leaves = [*features, *module.parameters()]
    out = module(*features)
    cotangents = [torch.randn_like(z) for z in flat(out)]
    found = torch.autograd.grad(flat(out), leaves, cotangents, allow_unused=True)
    assert all(map(torch.equal, features, kept))
    expected = plain(*features)
    leaves = [*features, *plain.parameters()]
    truth = torch.autograd.grad(flat(expected), leaves, cotangents, allow_unused=True)
    assert_same(named_logits(out), named_logits(expected), 1e-12)
    names = [str(i) for i in range(len(leaves))]
    if way == "data":  # autograd does not know of these writes
        found, truth = found[2:], truth[2:]
        names = names[2:]
    assert_same(dict(zip(names, found, strict=True)), dict(zip(names, truth, strict=True)), 1e-12)


# --- weights that a cache keeps ---


class Parametrized(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.hidden, self.out = wrap(nn.Linear(9, 9)), nn.Linear(9, 3)

    def forward(self, *features):
        return self.out(self.hidden(torch.cat(features, dim=1)))


@pytest.mark.parametrize("first", ["other call", "this call"])
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_cache_of_parametrizations_is_not_shared_by_the_passes(wrap, first):
    torch.manual_seed(0)
    module = Decoupled(Parametrized(getattr(parametrizations, wrap)).double())
    features = [torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (5, 4)]
    cotangents = outputs_like(module, features)
    expected, expected_grads = run(copy.deepcopy(module), features, cotangents)
    with parametrize.cached():
        kept = module.fusion.hidden.weight if first == "other call" else None
        out, grads = run(module, features, cotangents)
        weight = module.fusion.hidden.weight
        assert weight.requires_grad
        assert kept is None or kept is weight
        if wrap != "spectral_norm":  # each call moves its vectors
            assert_same(named_logits(out), named_logits(expected), 1e-12)
            assert_same(grads, expected_grads, 1e-12)
        # A second call gets the weight of the first.
        for z in module(*features).unimodal:
            z.backward(torch.randn_like(z))
        assert [n for n, g in grads_of(module.fusion, features).items() if g is not None] == [
            "features[0]",
            "features[1]",
        ]


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_sets_is_that_of_the_fused_pass(wrap):
    def make_fusion():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and in use
            return Parametrized(wrap).double()

    fusion, twin = make_fusion(), make_fusion()
    module = Decoupled(fusion)
    features = [torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (5, 4)]
    out = module(*features)
    twin(*features)
    assert_same({"weight": fusion.hidden.weight}, {"weight": twin.hidden.weight}, 1e-12)
    assert fusion.hidden.weight.grad_fn is not None
    for z in out.unimodal:
        z.backward(torch.randn_like(z))
    assert all(grad is None for grad in grads_of(fusion, []).values())


# --- buffers ---


class Clones(TorchDispatchMode):
    """Shapes of the tensors that are cloned."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


class Table(nn.Module):
    """Reads a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(7, 2))

    def forward(self, *features):
        return sum(features) * self.table[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_buffers_that_nothing_writes_are_not_copied_for_every_pass(training, inference):
    features = [torch.randn(3, 2) for _ in range(4)]
    module = Decoupled(Table()).train(training)
    norm = Decoupled(Cat(nn.BatchNorm1d(8))).train(training)
    with torch.inference_mode(inference), Clones() as clones:
        module(*features)
        norm(*features)
    assert clones.shapes.count((7, 2)) == 1  # a module of one's own may write: one to be safe
    # Torch's norms write in training only: the value at the start, and one for each pass.
    assert clones.shapes.count((8,)) == (2 * (1 + 4) if training else 0)


@pytest.mark.parametrize("passes", [(1,), (2,), (3,), (2, 3), (1, 2, 3)], ids=str)
def test_whichever_pass_writes_all_start_from_the_same_buffers(passes):
    features = [torch.randn(3, 2) for _ in range(2)]

    class Sometimes(Table):
        def forward(self, *features):
            seen.append(self.table[0, 0].item())
            if len(seen) in passes:
                self.table += 1
            return sum(features) * self.table[0]

    module, seen = Decoupled(Sometimes()), []
    out = module(*features)
    assert seen == [1.0] * 3
    assert (module.fusion.table == 1 + (1 in passes)).all()
    for k, (z, x) in enumerate(zip(flat(out), [sum(features), *features], strict=True), start=1):
        assert torch.equal(z, x * (1 + (k in passes)))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_statistics_of_a_norm_start_as_they_were(norm):
    """Its op writes without counting as one that does."""
    fusion = Cat(norm(4, affine=True, track_running_stats=True), dim=1)
    seen = []
    fusion[0].register_forward_pre_hook(lambda m, _: seen.append(m.running_mean.tolist()))
    Decoupled(fusion)(torch.randn(3, 2, 5), torch.randn(3, 2, 5))
    assert seen == [[0.0] * 4] * 3
    assert fusion[0].running_mean.all()


def test_tied_buffers_stay_tied_and_empty_ones_empty():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(()))
            self.register_buffer("b", self.a)
            self.register_buffer("late", None)

        def forward(self, *features):
            self.a += 1
            seen.append((self.b.item(), self.late))
            self.late = self.a.clone()
            return sum(features)

    seen, module = [], Decoupled(Tied())
    module(torch.randn(2), torch.randn(2))
    assert seen == [(1.0, None)] * 3
    assert module.fusion.late.item() == module.fusion.b.item() == 1
    assert module.fusion.a is module.fusion.b


@pytest.mark.parametrize("by", ["another module", "a hook", "a forward hook"])
def test_statistics_that_others_write_in_evaluation(by):
    """A norm does not write then; whoever does writes in the fused pass only."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, *features):
            x = torch.cat(features, dim=1)
            if by == "another module":
                self.norm.running_mean.copy_(x.mean(0))
            return self.norm(x)

    module = Decoupled(Adapted()).eval()
    norm, starts = module.fusion.norm, []

    def hook(module, args, *_):
        starts.append(module.running_mean.clone())
        module.running_mean.copy_(args[0].mean(0))

    if by == "a hook":
        norm.register_forward_pre_hook(hook)
    elif by == "a forward hook":
        norm.register_forward_hook(hook)
    features = [torch.randn(3, 2) + 1 for _ in range(2)]
    mean = norm.running_mean
    module(*features)
    assert norm.running_mean is mean
    assert torch.equal(mean, torch.cat(features, dim=1).mean(0))
    assert not any(start.any() for start in starts)


def test_attributes_are_those_of_the_fused_pass():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.before, self.calls = nn.Linear(9, 3), None, 0

        def forward(self, *features):
            self.calls += 1
            seen.append((self.calls, self.before))
            self.before = self.linear(torch.cat(features, dim=1))
            self.linear.last = self.before
            return self.before

    torch.manual_seed(0)
    module, seen = Decoupled(Stateful()), []
    features = [torch.randn(6, n, requires_grad=True) for n in (5, 4)]
    first = module(*features)
    assert module.fusion.before is module.fusion.linear.last is first.fused
    second = module(*features)
    assert seen == [(1, None)] * 3 + [(2, first.fused)] * 3
    assert module.fusion.before is second.fused


def test_a_pass_that_fails_leaves_the_module_as_the_fused_one_left_it():
    class Fails(NormedMLP):
        def forward(self, *features):
            z = super().forward(*features)
            if features[0].requires_grad:
                raise KeyError("unimodal")
            self.done = True
            return z

    torch.manual_seed(0)
    module = Decoupled(Fails())
    before = named_tensors(module)
    features = [torch.randn(6, n, requires_grad=True) for n in (5, 4)]
    with pytest.raises(KeyError, match="unimodal"):
        module(*features)
    assert all(named_tensors(module)[name] is tensor for name, tensor in before.items())
    assert module.fusion.done
    assert module.fusion.layers[1].num_batches_tracked == 1
    features[0].requires_grad_(False)
    module(*features).fused.backward(torch.randn(6, 3))  # nothing is locked


# --- threads ---


@pytest.fixture
def eager_switches():
    import sys

    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def in_threads(count, work):
    """Runs `work(k)` in threads; raises what one of them raised."""
    errors = []

    def guarded(k):
        try:
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("case", ["exchange", "two-names"])
def test_threads_train_one_module(case, eager_switches):
    module, features = make(case)
    module.eval()
    cotangents = outputs_like(module, features)
    before = named_tensors(module)
    parameters = dict(module.fusion.named_parameters())
    expected, truth = run(copy.deepcopy(module), features, cotangents)

    def work(k):
        for _ in range(8):
            own = [h.detach().clone().requires_grad_() for h in features]
            out = module(*own)
            leaves = [*own, *parameters.values()]
            grads = torch.autograd.grad(flat(out), leaves, cotangents)
            assert_same(named_logits(out), named_logits(expected), 1e-12)
            assert_same(dict(zip(truth, grads, strict=True)), truth, 1e-12)

    in_threads(4, work)
    assert all(named_tensors(module)[name] is tensor for name, tensor in before.items())


def test_modules_of_their_own_do_not_wait_for_each_other():
    """Ranks as threads meet inside their modules, in a collective."""
    barrier = threading.Barrier(2)

    class Meets(nn.Module):
        def forward(self, *features):
            barrier.wait(timeout=10)
            return sum(features)

    modules = [Decoupled(Meets()) for _ in range(2)]
    in_threads(2, lambda k: modules[k](torch.randn(2), torch.randn(2)))


def test_a_pass_may_call_the_module_again():
    """As a hook that reports what an evaluation gives."""
    module, features = make("concat")
    calls = []

    def again(fusion, args, z):
        if len(calls) < 2:
            calls.append(z)
            module(*features)

    module.fusion.register_forward_hook(again)
    thread = threading.Thread(target=lambda: calls.append(module(*features)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert len(calls) == 3

"""docs/from-published-code.md: what the published loop gets wrong, and the same loop here does not.

`published.py` and `decoupled.py` are the page's own blocks. Each check passes with the second and
fails with the first, and a second test says what happens there instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pages
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.problems import assert_same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PAGE = "from-published-code.md"
RANKS = 2
ALPHA = 2.0


def load(folder) -> SimpleNamespace:
    """The page's two modules."""
    pages.write_files(PAGE, folder)
    with pages.importable(folder):
        names = ("published", "decoupled")
        return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> SimpleNamespace:
    return load(tmp_path_factory.mktemp("page"))


def make(recipe: ModuleType) -> nn.Module:
    """The same values for both recipes, whose parameters have the same order and shapes."""
    model, generator = recipe.Model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def make_batch(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 40, generator=generator),
        torch.randn(rows, 90, generator=generator),
        torch.randint(10, (rows,), generator=generator),
    )


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    model = getattr(model, "module", model)
    # The head's layer is the module's own in one recipe, and held by the head in the other.
    return {
        name.replace("fusion.linear.", "fusion."): tensor.grad
        for name, tensor in model.named_parameters()
    }


def head_of(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in named.items() if name.startswith("fusion")}


def encoders_of(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in named.items() if not name.startswith("fusion")}


def losses(recipes: SimpleNamespace, model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    fused, unimodal = recipes.published.Model.forward(model, *batch[:2])
    target = batch[2]
    return F.cross_entropy(fused, target), ALPHA * sum(F.cross_entropy(z, target) for z in unimodal)


def expected(recipes: SimpleNamespace, batch) -> dict[str, Tensor]:
    """By definition: the multimodal loss on the head, the unimodal losses on the encoders."""
    model = make(recipes.published)
    fused, unimodal = losses(recipes, model, batch)
    named = dict(model.named_parameters())
    head, encoders = list(head_of(named)), list(encoders_of(named))
    found = dict(zip(head, torch.autograd.grad(fused, [named[n] for n in head]), strict=True))
    grad = torch.autograd.grad(unimodal, [named[n] for n in encoders])
    found |= dict(zip(encoders, grad, strict=True))
    return {name: found[name] for name in named}


@pytest.mark.parametrize("name", ["published", "decoupled"])
def test_both_are_right_where_the_published_loop_was_written_for(recipes, name):
    recipe = getattr(recipes, name)
    model = nn.DataParallel(make(recipe))
    recipe.backward(model, *make_batch(16), alpha=ALPHA)
    assert_same(grads(model), expected(recipes, make_batch(16)), 1e-6)


# --- a bare model ---


def check_bare_model(recipes: SimpleNamespace, recipe: ModuleType) -> None:
    model = make(recipe)
    recipe.backward(model, *make_batch(16), alpha=ALPHA)
    assert_same(grads(model), expected(recipes, make_batch(16)), 1e-6)


def test_a_bare_model(recipes):
    check_bare_model(recipes, recipes.decoupled)
    with pytest.raises(AssertionError, match=r"fusion\.weight"):
        check_bare_model(recipes, recipes.published)


def test_a_bare_models_head_was_trained_by_all_losses(recipes):
    batch = make_batch(16)
    model = make(recipes.published)
    recipes.published.backward(model, *batch, alpha=ALPHA)
    twin = make(recipes.published)
    sum(losses(recipes, twin, batch)).backward()
    assert_same(grads(model), grads(twin), 1e-6)


# --- gradient accumulation ---


def accumulate(recipe: ModuleType) -> nn.Module:
    model = nn.DataParallel(make(recipe))  # so that names match
    for part in zip(*(tensor.split(8) for tensor in make_batch(32)), strict=True):
        recipe.backward(model, *part, alpha=ALPHA, scale=1 / 4)
    return model


def check_accumulation(recipes: SimpleNamespace, recipe: ModuleType) -> None:
    assert_same(grads(accumulate(recipe)), expected(recipes, make_batch(32)), 1e-6)


def test_accumulation(recipes):
    check_accumulation(recipes, recipes.decoupled)
    with pytest.raises(AssertionError, match=r"fusion\.weight"):
        check_accumulation(recipes, recipes.published)


def test_accumulation_kept_the_last_micro_batch_on_the_head(recipes):
    found = grads(accumulate(recipes.published))
    last = tuple(tensor.split(8)[-1] for tensor in make_batch(32))
    of_last = {name: grad / 4 for name, grad in expected(recipes, last).items()}
    assert_same(head_of(found), head_of(of_last), 1e-6)
    assert_same(encoders_of(found), encoders_of(expected(recipes, make_batch(32))), 1e-6)


# --- DDP ---


def train_rank(rank: int, folder: str) -> None:
    """A few steps of each recipe on this rank's rows; saves the gradients of the first, too."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    recipes = load(Path(folder) / f"page{rank}")
    results = {}
    for name, recipe in vars(recipes).items():
        model = DistributedDataParallel(make(recipe))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            rows = (tensor[rank::RANKS] for tensor in make_batch(16, seed=step))
            recipe.backward(model, *rows, alpha=ALPHA)
            if step == 0:
                results[name, "grads"] = {k: v.clone() for k, v in grads(model).items()}
            optimizer.step()
        results[name, "values"] = model.module.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    for rank in range(RANKS):
        (folder / f"page{rank}").mkdir()
    mp.spawn(train_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def check_ranks(ranks: list[dict], name: str) -> None:
    assert_same(ranks[0][name, "values"], ranks[1][name, "values"], 0)


def test_ddp(recipes, ranks):
    check_ranks(ranks, "decoupled")
    assert_same(ranks[0]["decoupled", "grads"], expected(recipes, make_batch(16, seed=0)), 1e-6)
    with pytest.raises(AssertionError, match=r"fusion\.weight"):
        check_ranks(ranks, "published")


def test_ddp_never_saw_the_gradients_of_the_head(recipes, ranks):
    for rank, result in enumerate(ranks):
        own = expected(recipes, tuple(tensor[rank::RANKS] for tensor in make_batch(16, seed=0)))
        whole = expected(recipes, make_batch(16, seed=0))
        found = result["published", "grads"]
        assert_same(head_of(found), head_of(own), 1e-6)
        assert_same(encoders_of(found), encoders_of(whole), 1e-6)


# --- torch.compile ---


def check_compile(recipes: SimpleNamespace, recipe: ModuleType) -> None:
    """Three batches, the last of which is smaller, as that of an epoch is."""
    torch._dynamo.reset()
    model = make(recipe)
    compiled: Callable = torch.compile(model, backend="aot_eager")
    for rows in (16, 16, 12):
        model.zero_grad()
        recipe.backward(compiled, *make_batch(rows), alpha=ALPHA)
        assert_same(grads(model), expected(recipes, make_batch(rows)), 1e-6)


def test_compile(recipes):
    check_compile(recipes, recipes.decoupled)
    with pytest.raises(RuntimeError, match="donated buffers"):
        check_compile(recipes, recipes.published)


# --- memory ---


def test_the_encoders_activations_are_freed_in_the_only_pass(recipes):
    """`retain_graph=True` keeps them until the second pass, where nothing needs them."""
    for name, kept in (("published", True), ("decoupled", False)):
        recipe = getattr(recipes, name)
        model = nn.DataParallel(make(recipe))
        outputs = []
        model.module.audio.register_forward_hook(lambda *args, o=outputs: o.append(args[2]))
        recipe.backward(model, *make_batch(16), alpha=ALPHA)
        try:
            outputs[0].backward(torch.randn_like(outputs[0]))
        except RuntimeError:
            assert not kept
        else:
            assert kept

"""DDP and FSDP2 with two processes: the ranks agree, and equal one process on the whole batch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.problems import assert_same
from support.training import CASES, TwoModalities, batches, train, values
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

RANKS = 2
STEPS = 20
IDS = ["-".join(case) for case in CASES]

Results = dict[tuple[str, str, str], dict[str, Tensor] | str]


def train_ddp(rank: int, head: str, mode: str) -> dict[str, Tensor]:
    # DDP gives every rank the values of rank 0, so each may draw its own.
    model = DistributedDataParallel(TwoModalities(head, mode, seed=rank))
    train(model, ([part[rank::RANKS] for part in batch] for batch in batches(STEPS)))
    return values(model.module)


def shard(model: TwoModalities) -> None:
    """Every part for itself, the head included, and the rest by the root."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in (*model.encoders, model.head, model):
        fully_shard(part, mesh=mesh)


def train_fsdp(rank: int, head: str, mode: str) -> dict[str, Tensor]:
    model = TwoModalities(head, mode)
    shard(model)
    train(model, ([part[rank::RANKS] for part in batch] for batch in batches(STEPS)))
    return {name: value.full_tensor() for name, value in values(model).items()}


FUNCTIONS = (train_ddp, train_fsdp)


def work(rank: int, folder: str) -> None:
    """All that a rank does here: starting processes takes longer than training."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    results = {
        (function.__name__, *case): function(rank, *case)
        for function in FUNCTIONS
        for case in CASES
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@functools.cache
def one_process(head: str, mode: str) -> dict[str, Tensor]:
    model = TwoModalities(head, mode)
    train(model, batches(STEPS))
    return values(model)


def start(head: str, mode: str) -> dict[str, Tensor]:
    return values(TwoModalities(head, mode))


@pytest.mark.parametrize(("head", "mode"), CASES, ids=IDS)
def test_twenty_steps_change_every_parameter(head, mode):
    """Else the comparisons below would say little."""
    before = start(head, mode)
    for name, value in one_process(head, mode).items():
        assert (value - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize(("head", "mode"), CASES, ids=IDS)
def test_ddp_ranks_are_bitwise_equal(results, head, mode):
    first, second = (result["train_ddp", head, mode] for result in results)
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(("head", "mode"), CASES, ids=IDS)
def test_ddp_equals_one_process_on_the_whole_batch(results, head, mode):
    for result in results:
        assert_same(result["train_ddp", head, mode], one_process(head, mode), 1e-6)


@pytest.mark.parametrize(("head", "mode"), CASES, ids=IDS)
def test_fsdp_equals_one_process_on_the_whole_batch(results, head, mode):
    for result in results:
        assert_same(result["train_fsdp", head, mode], one_process(head, mode), 1e-6)

"""Training, model selection on the validation speakers, and one look at the test clips."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dgl_ext.types import DecoupledLoss

from . import checkpoint
from .data import SPLITS, Clip, Clips
from .loading import EpochBatches, evaluation_loader, training_loader
from .models import METHODS, MODALITIES, AudioVideoNet
from .processes import Processes

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BRANCHES = ("fused", *MODALITIES)

# What may differ when a run is resumed: none of it changes the trajectory.
FREE = {"epochs", "workers"}

Metrics = dict[str, Any]
Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]  # batches, what it is, how many


@dataclass(frozen=True)
class Config:
    """What a run is made of; the defaults of the schedule are those of the published runs."""

    method: str = "dgl"
    fusion: str = "concat"
    alpha: float = 2.0
    epochs: int = 100
    batch_size: int = 64
    lr: float = 2e-3
    lr_step: int = 70
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 40.0
    image_size: int = 224
    frames: int = 3
    width: int = 64
    vision: str = "own"
    amp: str = "none"
    seed: int = 0
    workers: int = 0
    backend: str = "auto"


class ResumeError(Exception):
    """A checkpoint does not belong to this run; the text says why."""


class Trainer:
    """A run: model, optimiser, data, and the files that it leaves.

    Args:
        config: what to do.
        splits: clips by the name of the split.
        out: folder for `last.pt` and `best.pt`.
        processes: this process among those of the run.
        watch: shows progress over batches.
        log: takes a line of text.
    """

    def __init__(
        self,
        config: Config,
        splits: dict[str, list[Clip]],
        out: Path,
        processes: Processes,
        watch: Watch,
        log: Callable[[str], None],
    ) -> None:
        self.config, self.out, self.processes = config, out, processes
        self._watch, self._log = watch, log
        self._digest = digest(splits)
        self.history: list[Metrics] = []
        self.best: Metrics | None = None

        torch.manual_seed(config.seed)
        self.model = AudioVideoNet(
            config.fusion,
            config.width,
            config.vision,
            config.alpha,
            backend=config.backend,
            **METHODS[config.method],
        ).to(processes.device)
        self._step_model: nn.Module = self.model
        if processes.world > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self._step_model = DistributedDataParallel(self.model, device_ids=devices)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.lr_step, config.lr_factor
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16")
        self._make_loaders(splits)

    def _make_loaders(self, splits: dict[str, list[Clip]]) -> None:
        config, rank, world = self.config, self.processes.rank, self.processes.world
        clips = {
            name: Clips(
                splits[name],
                image_size=config.image_size,
                frames=config.frames,
                augment=name == "train",
                library=config.vision,
                seed=config.seed,
            )
            for name in SPLITS
        }
        rest = config.workers, self.processes.device.type == "cuda"
        self.batches = EpochBatches(
            len(clips["train"]), config.batch_size, rank, world, config.seed
        )
        self._training = training_loader(clips["train"], self.batches, *rest)
        self._evaluation = {
            name: evaluation_loader(clips[name], config.batch_size, rank, world, *rest)
            for name in ("val", "test")
        }

    def run(self) -> Metrics:
        """Trains to the last epoch and measures the selected checkpoint on the test clips.

        Returns:
            The history, the selected epoch, and the test metrics.
        """
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            start = time.perf_counter()
            lr = self.schedule.get_last_lr()[0]
            train = self.train_epoch(epoch)
            self.schedule.step()
            self.processes.check_parameters(self.model)
            self.processes.share_buffers(self.model)
            val = self.evaluate("val")
            seconds = time.perf_counter() - start
            self.history.append(
                {"epoch": epoch, "lr": lr, "train": train, "val": val, "seconds": seconds}
            )
            self._save(epoch, val)
            self._log(
                f"epoch {epoch}/{self.config.epochs}: train {_percent(train)}, "
                f"val {_percent(val)}, {seconds:.1f} s"
            )
        selected = checkpoint.load(self.out / "best.pt")
        self.model.load_state_dict(selected["model"])
        test = self.evaluate("test")
        self._log(f"test, by the checkpoint of epoch {selected['epoch']}: {_percent(test)}")
        return {"history": self.history, "selected": self.best, "test": test}

    def train_epoch(self, epoch: int) -> Metrics:
        """One pass over the training clips.

        Args:
            epoch: from 1.

        Returns:
            Loss and accuracy of each branch while training.

        Raises:
            RuntimeError: the loss is not finite.
        """
        self._step_model.train()
        self.batches.epoch = epoch
        sums = Sums(self.processes.device)
        loader = self._watch(self._training, f"epoch {epoch}", len(self.batches))
        for rows, (*inputs, target) in zip(self.batches.counting(), loader, strict=True):
            inputs, target = self._move(inputs), self._move([target])[0]
            self.optimizer.zero_grad()
            with self._autocast():
                loss = self._step_model(*inputs, target)
            # A mean over the rows that count in all processes: DDP averages over processes.
            self.scaler.scale(loss.total * (self.processes.world / rows)).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            sums.add(loss)
        metrics = sums.metrics(self.processes)
        if not all(map(math.isfinite, metrics["loss"].values())):
            raise RuntimeError(f"epoch {epoch}: the loss is not finite: {metrics['loss']}")
        return metrics

    @torch.no_grad()
    def evaluate(self, split: str) -> Metrics:
        """Loss and accuracy of each branch; every clip counts once, however many processes.

        Args:
            split: "val" or "test".

        Returns:
            As `Sums.metrics`.
        """
        self.model.eval()
        sums = Sums(self.processes.device)
        loader: DataLoader = self._evaluation[split]
        for *inputs, target in self._watch(loader, split, len(loader)):
            inputs, target = self._move(inputs), self._move([target])[0]
            with self._autocast():
                loss = self.model(*inputs, target)
            sums.add(loss)
        return sums.metrics(self.processes)

    def _move(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.to(self.processes.device, non_blocking=True) for tensor in tensors]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AMP[self.config.amp]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype)

    def _save(self, epoch: int, val: Metrics) -> None:
        """Writes the checkpoints; the first of equally good epochs is selected."""
        accuracy = val["accuracy"]["fused"]
        better = self.best is None or accuracy > self.best["val"]["accuracy"]["fused"]
        if better:
            self.best = {"epoch": epoch, "val": val}
        states = checkpoint.rng_states(self.processes)
        if self.processes.first:
            common = {"config": asdict(self.config), "world": self.processes.world}
            common |= {"clips": self._digest, "model": self.model.state_dict()}
            # best.pt first: if the run dies in between, resuming repeats this epoch and writes it
            # again. The other way round, the old one would pass for the best.
            if better:
                checkpoint.save(self.out / "best.pt", common | self.best)
            rest = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": states,
                "history": self.history,
                "best": self.best,
            }
            checkpoint.save(self.out / "last.pt", common | rest)
        self.processes.wait()

    def resume(self) -> None:
        """Goes on from `last.pt`.

        Raises:
            ResumeError: there is none, or it is of a run with other settings, clips or processes.
        """
        path = self.out / "last.pt"
        if not path.is_file():
            raise ResumeError(f"--resume: no checkpoint {path}")
        saved = checkpoint.load(path)
        for name, value in asdict(self.config).items():
            if name not in FREE and saved["config"][name] != value:
                was = saved["config"][name]
                raise ResumeError(f"--resume: {path} was made with {name} {was!r}, got {value!r}")
        if saved["world"] != self.processes.world:
            raise ResumeError(
                f"--resume: {path} was made by {saved['world']} processes, "
                f"got {self.processes.world}"
            )
        if len(saved["history"]) > self.config.epochs:
            raise ResumeError(f"--resume: {path} has {len(saved['history'])} epochs already")
        if saved["clips"] != self._digest:
            raise ResumeError(f"--resume: {path} was made with other clips, or with another split")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        self.history, self.best = saved["history"], saved["best"]
        checkpoint.set_rng_state(saved["rng"][self.processes.rank])


class Sums:
    """Losses and hits, added up on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2 * len(BRANCHES) + 1, dtype=torch.float64, device=device)

    def add(self, loss: DecoupledLoss) -> None:
        """Adds a batch whose losses are sums over the rows that count."""
        parts = [torch.stack([loss.fused, *loss.unimodal]), loss.correct, loss.count[:1]]
        self._sums += torch.cat([part.to(torch.float64) for part in parts])

    def metrics(self, processes: Processes) -> Metrics:
        """Means over the rows of all processes: `loss` and `accuracy` by branch, and `rows`."""
        *values, rows = processes.add_up(self._sums).tolist()
        count = len(BRANCHES)
        return {
            "loss": {name: values[i] / rows for i, name in enumerate(BRANCHES)},
            "accuracy": {name: values[count + i] / rows for i, name in enumerate(BRANCHES)},
            "rows": int(rows),
        }


def digest(splits: dict[str, list[Clip]]) -> str:
    """A fingerprint of the names of all clips and of the split."""
    text = "\n".join(f"{name} {clip.name}" for name in SPLITS for clip in splits[name])
    return hashlib.sha256(text.encode()).hexdigest()


def _percent(metrics: Metrics) -> str:
    return " / ".join(f"{metrics['accuracy'][name]:.1%} {name}" for name in BRANCHES)

"""The CREMA-D example on a tiny data set in CREMA-D's folder format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from crema_d import checkpoint, cli, data  # noqa: E402
from crema_d.models import METHODS, AudioVideoNet  # noqa: E402
from crema_d.processes import Processes  # noqa: E402
from crema_d.train import Config, Trainer  # noqa: E402
from crema_d_files import make_data, write_wav  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
TINY = ("--image-size", "32", "--width", "8", "--batch-size", "8", "--workers", "0")
SMALL = Config(image_size=32, width=8, batch_size=8, lr=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("crema_d") / "data"
    make_data(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder, out, *arguments):
    """Runs the program in this process and returns its results."""
    command = ["--data", str(folder), "--out", str(out), "--device", "cpu", *TINY, *arguments]
    assert cli.main(command) == 0
    return json.loads((out / "results.json").read_text())


def error(capsys, *arguments):
    """Runs the program, which must refuse, and returns what it says."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--device", "cpu", *TINY])
    assert stopped.value.code == 2
    return capsys.readouterr().err.replace("\n", " ")


def trainer(folder, out, config=SMALL, processes=ALONE):
    splits = data.make_splits(data.find_clips(folder), None, 0.2, 0.2, 0)
    return Trainer(config, splits, out, processes, lambda batches, *_: batches, lambda _: None)


# --- the model ---


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_losses_that_they_say(method):
    """Against plain PyTorch with detach where the method cuts."""
    torch.manual_seed(0)
    net = AudioVideoNet("concat", 4, "own", 1.7, backend="reference", **METHODS[method]).eval()
    net.alpha = 0.0 if method == "joint" else 1.7
    inputs = torch.randn(3, 1, 64, 64), torch.randn(3, 2, 3, 32, 32), torch.tensor([0, 5, 2])
    net(*inputs).total.backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()

    x, y = net.features(*inputs[:2])
    weight, bias, target = net.head.weight, net.head.bias, inputs[2]
    cut = method == "dgl"
    xy = torch.cat([x, y], 1)
    total = F.cross_entropy(F.linear(xy.detach() if cut else xy, weight, bias), target)
    for h, w in zip((x, y), weight.split(x.shape[1], dim=1), strict=True):
        w, b = (w.detach(), bias.detach()) if cut else (w, bias)
        total = total + net.alpha * F.cross_entropy(F.linear(h, w, b), target)
    (3 * total).backward()  # the network sums over rows
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


# --- whole runs ---


def saved(out, name="last"):
    return checkpoint.load(out / f"{name}.pt")


def assert_same_tensors(a, b):
    """Nested dicts and lists are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("seconds", "epochs", "workers"):
                assert_same_tensors(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same_tensors(*pair)
    else:
        assert a == b


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(folder, tmp_path):
    whole = run(folder, tmp_path / "whole", "--epochs", "3", "--lr-step", "2")
    run(folder, tmp_path / "parts", "--epochs", "1", "--lr-step", "2")
    parts = run(folder, tmp_path / "parts", "--epochs", "3", "--lr-step", "2", "--resume")
    assert [epoch["lr"] for epoch in whole["history"]] == pytest.approx([2e-3, 2e-3, 2e-4])
    assert_same_tensors(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert_same_tensors(saved(tmp_path / "whole", "best"), saved(tmp_path / "parts", "best"))
    assert_same_tensors(whole, parts)


@pytest.mark.slow
def test_it_learns_what_can_be_learnt(folder, tmp_path):
    results = run(folder, tmp_path, "--epochs", "16", "--lr", "0.02", "--seed", "1")
    assert results["history"][-1]["train"]["accuracy"]["fused"] > 0.8
    assert results["test"]["accuracy"]["fused"] > 0.5


# --- what it refuses ---


def test_missing_data_is_said_plainly(tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    gone = tmp_path / "gone"
    assert f"{gone}: no such folder" in error(capsys, "--data", str(gone), *out)
    (gone / "AudioWAV").mkdir(parents=True)
    assert "Image-01-FPS: no such folder" in error(capsys, "--data", str(gone), *out)
    (gone / "Image-01-FPS").mkdir()
    assert "AudioWAV: no .wav files" in error(capsys, "--data", str(gone), *out)
    write_wav(gone / "AudioWAV" / "1001_DFA_ANG_XX.wav", [0.1])
    told = error(capsys, "--data", str(gone), *out)
    assert "none of 1 clips is complete" in told
    assert "no frames in Image-01-FPS/1001_DFA_ANG_XX" in told
    assert not (tmp_path / "out").exists()


# --- several processes ---


def torchrun(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WORKER = """
import sys, torch
sys.path[:0] = [{tests!r}, {examples!r}]
from pathlib import Path
from crema_d import processes
from test_crema_d import SMALL, Config, frozen_step, trainer

mine = processes.start("cpu")
own = trainer(Path({folder!r}), Path({out!r}), Config(**vars(SMALL) | {{"batch_size": 64}}), mine)
metrics = frozen_step(own)
if mine.first:
    torch.save({{"model": own.model.state_dict(), "metrics": metrics}}, {out!r} + "/two.pt")
mine.check_parameters(own.model)
if not mine.first:
    with torch.no_grad():
        own.model.head.bias[0] += 1e-6
try:
    mine.check_parameters(own.model)
except RuntimeError as error:
    print(error)
processes.stop()
"""


def frozen_step(own):
    """One step on all training clips, with the statistics of BatchNorm as they are.

    (With those of a process's own rows, two processes cannot equal one.)
    """
    own.model.eval()
    own._step_model.train = lambda mode=True: None
    return own.train_epoch(1)


def test_two_processes_step_as_one_does(tmp_path):
    folder = tmp_path / "data"
    make_data(folder, speakers=3, clips=5)  # 5 training rows, so that one is repeated
    worker = tmp_path / "worker.py"
    paths = {"folder": str(folder), "out": str(tmp_path), "tests": str(Path(__file__).parent)}
    worker.write_text(WORKER.format(**paths, examples=str(ROOT / "examples")))
    assert torchrun(str(worker)).count("parameters have drifted apart") == 2

    alone = trainer(folder, tmp_path, Config(**vars(SMALL) | {"batch_size": 64}))
    start = {name: value.clone() for name, value in alone.model.state_dict().items()}
    metrics = frozen_step(alone)
    two = saved(tmp_path, "two")
    assert metrics["rows"] == two["metrics"]["rows"] == 5
    assert metrics["accuracy"] == two["metrics"]["accuracy"]
    assert metrics["loss"] == pytest.approx(two["metrics"]["loss"], rel=1e-5)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-6, rtol=0)
    moved = [name for name, p in alone.model.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) == len(list(alone.model.parameters()))

"""The CREMA-D example on a tiny data set in CREMA-D's folder format."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("PIL")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from crema_d import checkpoint, cli, data, images, vision  # noqa: E402
from crema_d.models import METHODS, AudioVideoNet, ResNet18, resnet18  # noqa: E402
from crema_d.processes import Processes  # noqa: E402
from crema_d.train import BRANCHES, Config, Trainer  # noqa: E402
from crema_d_files import make_data, write_wav  # noqa: E402

from dgl_ext.heads import HEADS  # noqa: E402

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


def test_the_resnet_has_the_published_size():
    assert sum(p.numel() for p in ResNet18(3).parameters()) == 11_689_512 - 513_000  # without fc
    assert ResNet18(1, 8)(torch.randn(2, 1, 257, 188)).shape == (2, 64)


def test_torchvisions_weights_give_the_same_features():
    try:
        vision.torchvision()
    except ImportError as why:
        pytest.skip(str(why))
    torch.manual_seed(0)
    theirs, ours = resnet18(3, 64, "torchvision").eval(), ResNet18(3).eval()
    ours.load_state_dict(theirs.state_dict())
    frames = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(frames), theirs(frames))
    assert resnet18(1, 64, "torchvision")(torch.randn(2, 1, 64, 64)).shape == (2, 512)


def test_torchvisions_crops_are_taken(folder):
    try:
        vision.torchvision()
    except ImportError as why:
        pytest.skip(str(why))
    path = next(iter(data.find_clips(folder).clips.values())).frames[0]
    torch.manual_seed(0)
    draws = [images.load_frames([path], 16, True, "torchvision") for _ in range(4)]
    assert len({draw.sum().item() for draw in draws}) == 4
    assert vision.choose("auto", 64) == "torchvision"


def test_torchvision_that_does_not_load_is_replaced_and_reported(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vision.importlib, "import_module", broken)
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: object())
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert vision.choose("auto", 64) == "own"
    with pytest.raises(ValueError, match="does not load"):
        vision.choose("torchvision", 64)
    assert vision.choose("auto", 8) == "own"


def test_a_clips_feature_is_the_mean_over_its_frames():
    torch.manual_seed(0)
    net = AudioVideoNet("concat", 8, "own", 1.0).eval()
    frames = torch.randn(2, 3, 3, 32, 32)
    found = net.features(torch.randn(2, 1, 64, 64), frames)[1]
    one_by_one = torch.stack([net.video(frames[:, t]) for t in range(3)])
    torch.testing.assert_close(found, one_by_one.mean(0))


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


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # fp16's first epoch
@pytest.mark.parametrize(
    ("method", "amp"),
    [*((method, amp) for method in METHODS for amp in ("none", "bf16")), ("dgl", "fp16")],
)
def test_every_method_trains_in_every_precision(folder, tmp_path, method, amp):
    fusion = list(HEADS)[list(METHODS).index(method)]
    options = ("--method", method, "--fusion", fusion, "--amp", amp, "--frames", "2")
    # The gradient scaler skips steps until it has found a scale.
    results = run(folder, tmp_path, "--epochs", "3" if amp == "fp16" else "1", *options)
    assert results["config"]["method"] == method
    assert results["config"]["alpha"] == {"dgl": 2, "joint": 0, "regularised": 1}[method]
    assert results["history"][0]["train"]["rows"] == 24
    assert results["test"]["rows"] == 6
    speakers = results["data"]["speakers"]
    assert set(speakers["val"]).isdisjoint(speakers["train"] + speakers["test"])
    for part in (results["test"], results["history"][0]["val"]):
        assert set(part["accuracy"]) == set(BRANCHES)
        assert all(round(6 * value, 9) in range(7) for value in part["accuracy"].values())
    splits = data.make_splits(data.find_clips(folder), None, 0.1, 0.1, 0)
    start = Trainer(
        Config(**results["config"]), splits, tmp_path, ALONE, lambda b, *_: b, lambda _: None
    ).model.state_dict()
    trained = saved(tmp_path)["model"]
    for name in ("audio.conv1.weight", "video.layer4.1.conv2.weight"):
        assert not torch.equal(start[name], trained[name])


@pytest.mark.slow
def test_it_learns_what_can_be_learnt(folder, tmp_path):
    results = run(folder, tmp_path, "--epochs", "16", "--lr", "0.02", "--seed", "1")
    assert results["history"][-1]["train"]["accuracy"]["fused"] > 0.8
    assert results["test"]["accuracy"]["fused"] > 0.5


def test_the_validation_speakers_select_and_the_test_is_measured_once(
    folder, tmp_path, monkeypatch
):
    run_ = trainer(folder, tmp_path, Config(**vars(SMALL) | {"epochs": 4}))
    measured = []
    accuracies = iter([0.3, 0.5, 0.5, 0.4])

    def evaluate(split):
        measured.append((split, run_.model.head.bias.detach().clone()))
        fused = next(accuracies) if split == "val" else 0.0
        return {"accuracy": dict.fromkeys(BRANCHES, 0.0) | {"fused": fused}}

    monkeypatch.setattr(run_, "evaluate", evaluate)
    results = run_.run()
    assert [split for split, _ in measured] == ["val"] * 4 + ["test"]
    assert results["selected"]["epoch"] == saved(tmp_path, "best")["epoch"] == 2
    assert torch.equal(measured[4][1], measured[1][1])
    assert not torch.equal(measured[4][1], measured[3][1])


def test_the_defaults_are_the_published_schedule(folder, tmp_path):
    options = cli.make_parser().parse_args(["--data", str(folder), "--out", str(tmp_path)])
    chosen = {name: getattr(options, name) for name in ("epochs", "batch_size", "clip", "frames")}
    assert chosen == {"epochs": 100, "batch_size": 64, "clip": 40, "frames": 1}
    run_ = trainer(folder, tmp_path, Config(image_size=32, width=8))
    group = run_.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (2e-3, 0.9, 1e-4)
    assert (run_.schedule.step_size, run_.schedule.gamma) == (70, 0.1)
    assert isinstance(run_.optimizer, torch.optim.SGD)


def test_gradients_are_clipped_together(folder, tmp_path):
    def moved(clip):
        config = Config(**vars(SMALL) | {"clip": clip, "batch_size": 64, "weight_decay": 0.0})
        run_ = trainer(folder, tmp_path, config)
        before = [p.detach().clone() for p in run_.model.parameters()]
        run_.train_epoch(1)  # one batch
        steps = [a - b for a, b in zip(run_.model.parameters(), before, strict=True)]
        return nn.utils.get_total_norm(steps).item() / config.lr

    free = moved(float("inf"))
    assert moved(0.5 * free) == pytest.approx(0.5 * free, rel=1e-3)
    assert moved(2 * free) == pytest.approx(free, rel=1e-3)


def test_a_run_that_diverges_stops(folder, tmp_path):
    run_ = trainer(folder, tmp_path)
    with torch.no_grad():
        run_.model.head.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="epoch 1: the loss is not finite"):
        run_.run()


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "last.pt", {"epoch": lambda: 2})
    assert saved(tmp_path) == {"epoch": 1}


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


def test_options_that_do_not_go_together_are_refused(folder, tmp_path, capsys):
    base = ("--data", str(folder), "--out", str(tmp_path))
    for options, message in (
        (("--method", "joint", "--alpha", "1"), "joint training has no unimodal losses"),
        (("--train-list", "x.csv"), "give both or none"),
        (("--vision", "torchvision"), "has width 64, got --width 8"),
        (("--batch-size", "1"), "--batch-size: expected"),
        (("--epochs", "0"), "above 0"),
        (("--val-share", "1"), "between 0 and 1"),
        (("--lr", "nan"), "at least 0"),
        (("--resume",), "no checkpoint"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*base, "--device", "cpu", *TINY, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_only_the_same_run_is_resumed(folder, tmp_path, capsys):
    run(folder, tmp_path, "--epochs", "2")
    base = ("--data", str(folder), "--out", str(tmp_path))
    assert "holds a run; --resume continues it" in error(capsys, *base)
    told = error(capsys, *base, "--resume", "--lr", "0.1")
    assert "was made with lr 0.002, got 0.1" in told
    assert "other clips" in error(capsys, *base, "--resume", "--test-share", "0.5")
    assert "has 2 epochs already" in error(capsys, *base, "--resume", "--epochs", "1")


def test_the_readme_names_only_options_that_exist():
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "examples/crema_d/README.md").read_text()))
    parser = {option for action in cli.make_parser()._actions for option in action.option_strings}
    others = {"--help", "--nproc-per-node", "--skip-smudge", "--include"}
    assert named - others <= parser
    assert {"--data", "--out", "--resume", "--method", "--fusion", "--amp"} <= named


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


def test_two_processes_count_every_clip_once(folder, tmp_path):
    program = str(ROOT / "examples" / "crema_d")
    printed = torchrun(
        program, "--data", str(folder), "--out", str(tmp_path), "--device", "cpu", *TINY,
        "--epochs", "2", "--test-share", "0.3",
    )  # fmt: skip
    assert printed.count("epoch 2/2") == 1  # one of them prints
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["processes"] == 2

    splits = data.make_splits(data.find_clips(folder), None, 0.1, 0.3, 0)
    alone = Trainer(
        Config(**results["config"]), splits, tmp_path, ALONE, lambda b, *_: b, lambda _: None
    )
    alone.model.load_state_dict(saved(tmp_path, "best")["model"])
    test = alone.evaluate("test")
    assert test["rows"] == results["test"]["rows"] == len(splits["test"])
    assert test["accuracy"] == results["test"]["accuracy"]
    assert test["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)
    # The running statistics of BatchNorm are those of the first process everywhere.
    val = alone.evaluate("val")
    assert val["accuracy"] == results["selected"]["val"]["accuracy"]
    assert val["loss"] == pytest.approx(results["selected"]["val"]["loss"], rel=1e-4)


WORKER = """
import sys, torch
sys.path[:0] = [{tests!r}, {examples!r}]
from pathlib import Path
from crema_d import processes
from test_crema_d import SMALL, Config, frozen_step, trainer

mine = processes.start("cpu")
own = trainer(Path({folder!r}), Path({out!r}), Config(**vars(SMALL) | {{"batch_size": 64}}), mine)
frozen_step(own)
if mine.first:
    torch.save(own.model.state_dict(), {out!r} + "/two.pt")
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
    assert frozen_step(alone)["rows"] == 5
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)
    moved = [name for name, p in alone.model.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) == len(list(alone.model.parameters()))

"""The example with seen and heard digits: its parts, and a small run from end to end."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("sklearn", "scipy", "matplotlib", "rich"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "av_digits"
sys.path.insert(0, str(ROOT / "examples"))

from av_digits import features, ogm_ge, report, speech  # noqa: E402
from av_digits.measure import attenuation  # noqa: E402
from av_digits.methods import METHODS  # noqa: E402
from av_digits.models import MODALITIES, Network  # noqa: E402

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="needs espeak-ng, which makes the speech"
)


class Inputs:
    """Random pairs with the shapes of the real ones."""

    def __init__(self, n: int) -> None:
        self.inputs = (torch.randn(n, 1, 8, 8), torch.randn(n, 1, 32, 51))
        self.digits = torch.randint(10, (n,))


@pytest.fixture
def pairs() -> Inputs:
    torch.manual_seed(7)
    return Inputs(12)


def network_of(name: str) -> Network:
    method = METHODS[name]
    return Network(method.modalities, method.fusion, 3, method.encoder_leak, method.head_leak)


# --- speech and features ---


@pytest.mark.parametrize("hz", [300.0, 1000.0, 2500.0])
def test_log_mel_puts_a_tone_into_its_band(hz: float) -> None:
    seconds = torch.arange(8000) / 8000
    bands = features.log_mel(torch.sin(2 * math.pi * hz * seconds)[None], 8000)[0, :, 10:-10]
    # Independently of the code: 34 edges, evenly spaced in mel from 80 Hz to 4000 Hz.
    mel = [2595 * math.log10(1 + f / 700) for f in (80, hz, 4000)]
    position = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 33
    expected = {math.floor(position) - 1, math.ceil(position) - 1}
    assert set(bands.argmax(0).tolist()) <= expected
    # A Hann window has died down by 60 dB far from the tone.
    far = bands[-1] if hz < 1000 else bands[0]
    assert (bands.amax(0) - far).min() > math.log(1e4)


def test_log_mel_of_a_tone_has_its_power() -> None:
    seconds = torch.arange(8000) / 8000
    tone = torch.sin(2 * math.pi * 1000 * seconds)
    quiet, loud = (features.log_mel(a * tone[None], 8000)[0, :, 20].max() for a in (0.1, 1.0))
    assert (loud - quiet).item() == pytest.approx(math.log(100), abs=1e-3)
    # |X| at the tone's bin is amplitude x sum(window) / 2 = 64, and a filter's peak is 1.
    assert loud.item() == pytest.approx(math.log(64**2), abs=0.7)


def test_the_splits_share_no_voice() -> None:
    train, test = (speech.plan(split, 110) for split in ("train", "test"))
    assert {u.variant for u in train} == set(speech.VARIANTS["train"])
    assert {u.variant for u in test} == set(speech.VARIANTS["test"])
    assert not {u.variant for u in train} & {u.variant for u in test}
    assert not {u.voice for u in train} & {u.voice for u in test}
    assert len({u.accent for u in test}) > 3


def test_the_plan_is_always_the_same() -> None:
    assert speech.plan("train", 5) == speech.plan("train", 5)
    assert [u.digit for u in speech.plan("test", 2)] == [d for d in range(10) for _ in range(2)]


def test_without_espeak_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(speech.SpeechError, match="apt-get install espeak-ng"):
        speech.espeak_version()


@needs_espeak
def test_a_missing_voice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    speech.check_voices()
    monkeypatch.setattr(speech, "ACCENTS", ("en-us", "en-nowhere"))
    with pytest.raises(speech.SpeechError, match="en-nowhere"):
        speech.check_voices()


# --- methods ---


def test_ogm_ge_coefficients_by_hand() -> None:
    # rho = 6 / 4 = 1.5 for the first, 2 / 3 for the second, which is behind and stays as it is.
    first, second = ogm_ge.coefficients([6.0, 4.0], alpha=0.5)
    assert first == pytest.approx(1 - 0.635148952, abs=1e-8)  # tanh(0.75)
    assert second == 1.0
    assert ogm_ge.coefficients([4.0, 6.0], alpha=0.5) == [second, first]
    assert ogm_ge.coefficients([5.0, 5.0], alpha=0.5) == [1.0, 1.0]


def test_ogm_ge_scores_halve_the_bias(pairs: Inputs) -> None:
    head = network_of("ogm_ge").head
    h = [torch.randn(12, 64), torch.randn(12, 64)]
    out = head(*h)
    found = ogm_ge.scores(out, head.bias, pairs.digits)
    for i, columns in enumerate(head.weight.split(64, dim=1)):
        right = (h[i] @ columns.T + head.bias / 2).softmax(1)[range(12), pairs.digits].sum()
        torch.testing.assert_close(found[i], right, rtol=1e-4, atol=1e-5)


def test_ogm_ge_scales_convolutions_and_adds_their_deviation() -> None:
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Linear(8, 8))
    before = []
    for parameter in layers.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.3 + 0.1
        before.append(parameter.grad.clone())
    ogm_ge.modulate(layers.parameters(), 0.25, torch.Generator().manual_seed(1))
    after = [parameter.grad for parameter in layers.parameters()]
    noise = after[0] - 0.25 * before[0]
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    for now, then in list(zip(after, before, strict=True))[1:]:  # biases and the linear layer
        assert torch.equal(now, then)


def test_an_encoder_starts_the_same_under_every_method() -> None:
    joint = network_of("joint").encoders
    for name in METHODS:
        for modality, encoder in network_of(name).encoders.items():
            for mine, other in zip(encoder.parameters(), joint[modality].parameters(), strict=True):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["joint", "regularised", "dgl_2"])
def test_the_settings_are_the_methods(name: str, pairs: Inputs) -> None:
    """Gradients against the method written out with detach and plain layers."""
    method, network = METHODS[name], network_of(name)
    method.loss(network(pairs.inputs), pairs.digits).backward()
    got = [p.grad for p in network.parameters()]

    plain = network_of(name)
    h = plain.features(pairs.inputs)
    weight, bias = plain.head.weight, plain.head.bias
    cut = name == "dgl_2"
    entropy = torch.nn.functional.cross_entropy
    linear = torch.nn.functional.linear
    loss = entropy(
        linear(torch.cat([x.detach() if cut else x for x in h], 1), weight, bias), pairs.digits
    )
    share = {"joint": 0.0, "regularised": 1.0, "dgl_2": 2.0}[name]
    for x, columns in zip(h, weight.split(64, 1), strict=True):
        w, b = (columns.detach(), bias.detach()) if cut else (columns, bias)
        loss = loss + share * entropy(linear(x, w, b), pairs.digits)
    loss.backward()
    for mine, other in zip(got, [p.grad for p in plain.parameters()], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["joint", "dgl_1"])
def test_attenuation_is_the_ratio_of_the_two_gradients(name: str, pairs: Inputs) -> None:
    network = network_of(name)
    found = attenuation(network, pairs)
    h = [x.detach().requires_grad_() for x in network.features(pairs.inputs)]
    weight, bias = network.head.weight.detach(), network.head.bias.detach()
    entropy = torch.nn.functional.cross_entropy
    fused = torch.autograd.grad(entropy(torch.cat(h, 1) @ weight.T + bias, pairs.digits), h)
    for i, columns in enumerate(weight.split(64, 1)):
        (alone,) = torch.autograd.grad(entropy(h[i] @ columns.T + bias, pairs.digits), h[i])
        assert found[i] == pytest.approx((fused[i].norm() / alone.norm()).item(), rel=1e-3)
    assert network.head.encoder_leak == METHODS[name].encoder_leak


def test_differences_are_paired() -> None:
    difference = report.paired([3.0, 5.0, 4.0], [1.0, 4.0, 4.0])
    assert difference == {"mean": 1.0, "standard_error": pytest.approx(1 / math.sqrt(3))}


def test_one_seed_has_no_spread() -> None:
    assert report.spread([3.0]) == {"mean": 3.0, "std": None}
    assert report.cell({"fused": {"mean": 3.0, "std": None}}, "fused") == "3.0"


# --- end to end ---


@needs_espeak
def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--cache", str(tmp_path / "c")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document["summary"]) == {*METHODS, "late_logits", "late_mean"}
    assert len(document["runs"]) == len(METHODS)
    for curves in document["attenuation"].values():
        assert set(curves) <= set(MODALITIES)
    for plot in ("accuracy", "gradient_norms", "attenuation"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 10_000
    table = (tmp_path / "results.md").read_text()
    assert all(method.label in table for method in METHODS.values())


@needs_espeak
def test_runs_that_diverge_are_reported_and_stop_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--lr", "1e30"]
    command += ["--methods", "joint", "dgl_1", "--cache", str(tmp_path / "c")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert all(run["diverged"] for run in document["runs"])
    text = (tmp_path / "results.md").read_text()
    assert "Diverged, weights no longer finite: joint, seed 0; DGL concat, alpha 1, seed 0" in text


def test_the_committed_table_is_that_of_the_committed_runs() -> None:
    document = json.loads((FOLDER / "results" / "results.json").read_text())
    table = report.table(document)
    assert table in (FOLDER / "results" / "results.md").read_text()
    for name, summary in document["summary"].items():
        values = [run["fused"] for run in document["runs"] if run["method"] == name]
        if values:
            assert summary["fused"]["mean"] == pytest.approx(sum(values) / len(values))
            assert len(values) == len(document["seeds"]) >= 5


def test_the_readme_says_what_was_measured() -> None:
    document = json.loads((FOLDER / "results" / "results.json").read_text())
    assert report.table(document) in (FOLDER / "README.md").read_text()
    fused = {(run["method"], run["seed"]): run["fused"] for run in document["runs"]}

    def difference(name: str, other: str) -> dict[str, float]:
        series = [[fused[one, seed] for seed in document["seeds"]] for one in (name, other)]
        return report.paired(*series)

    # "DGL beats joint training and OGM-GE", "the unimodal losses do as well or better".
    for dgl in ("dgl_1", "dgl_2", "dgl_sum"):
        for weaker in ("joint", "ogm_ge"):
            gain = difference(dgl, weaker)
            assert gain["mean"] > 2 * gain["standard_error"]
        assert difference(dgl, "regularised")["mean"] < 0

"""The example with digits in six views: its data, its masks, and a small run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("sklearn", "matplotlib"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "multiview_digits"
sys.path.insert(0, str(ROOT / "examples"))

from multiview_digits import data, report  # noqa: E402
from multiview_digits.train import METHODS, Network  # noqa: E402


@pytest.fixture(scope="module")
def cache() -> Path:
    """The folder with the data, which is downloaded if it is not there."""
    try:
        data.load_views(FOLDER / "cache")
    except data.DataError as error:
        pytest.skip(str(error))
    return FOLDER / "cache"


def test_the_data_are_those_of_uci(cache: Path) -> None:
    views, digits = data.load_views(cache)
    assert [tuple(view.shape) for view in views] == [(2000, w) for w in (76, 216, 64, 240, 47, 6)]
    assert digits.bincount().tolist() == [200] * 10
    # The pixels are sums over windows of 2 x 3.
    assert set(views[3].unique().tolist()) == set(range(7))


def test_splits_are_disjoint_scaled_by_training_rows_and_drawn_by_the_seed(cache: Path) -> None:
    train, test = data.load_splits(cache, 3, 300, 1000, 0)
    assert (len(train.digits), len(test.digits)) == (300, 1000)
    assert train.present.all()
    assert test.present.all()
    for view in train.views:
        assert view.mean(0).abs().max() < 1e-5
        std = view.std(0)
        assert ((std - 1).abs() < 1e-4).logical_or(std == 0).all()
    # A row in both splits would show, as they are scaled alike; six digits are in the data twice.
    rows = torch.cat([train.views[2], test.views[2]])
    assert len(rows.unique(dim=0)) >= 1300 - 6
    again, other = (data.load_splits(cache, seed, 300, 1000, 0)[0] for seed in (3, 4))
    assert torch.equal(again.views[0], train.views[0])
    assert not torch.equal(other.digits, train.digits)


def test_missing_views_do_not_set_the_scale(cache: Path) -> None:
    train, _ = data.load_splits(cache, 0, 300, 1000, 0.3)
    for i, view in enumerate(train.views):
        assert view[train.present[:, i]].mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9, 1.0])
def test_no_row_is_left_without_a_view(missing: float) -> None:
    present = data.draw_present(20_000, missing, torch.Generator().manual_seed(0))
    assert present.any(1).all()
    # Of 6 views (1 - missing) * 6 stay, and one more where that leaves none.
    expected = (1 - missing) + missing**6 / 6
    assert present.double().mean(0).tolist() == pytest.approx([expected] * 6, abs=0.02)


def test_an_encoder_starts_the_same_in_every_network() -> None:
    state = torch.random.get_rng_state()
    six, pair = Network(range(6), "joint", 1), Network([2, 5], "dgl", 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for mine, other in zip(pair.encoders, (six.encoders[2], six.encoders[5]), strict=True):
        assert torch.equal(mine[0].weight, other[0].weight)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / data.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(data.DataError, match="SHA-256"):
        data.load_views(tmp_path)


def test_smoke_run(cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--seeds", "7"]
    command += ["--cache", str(cache), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in document["runs"]] == [(m, 7) for m in METHODS]
    for run in document["runs"]:
        assert set(run["probes"]) == set(data.VIEWS)
        keys = {"all", "missing", *document["pairs"]} if run["method"] != "untrained" else set()
        assert set(run["fused"]) == keys
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert all(label in (tmp_path / "results.md").read_text() for label in METHODS.values())


def test_the_readme_has_the_committed_tables() -> None:
    document = json.loads((FOLDER / "results" / "results.json").read_text())
    for table in (report.fused_table, report.probe_table, report.pair_table):
        for file in ("README.md", "results/results.md"):
            assert table(document) in (FOLDER / file).read_text()

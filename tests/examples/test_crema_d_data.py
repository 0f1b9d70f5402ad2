"""The CREMA-D example's data: sounds, frames, splits, batches."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("soundfile")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from crema_d import audio, data  # noqa: E402
from crema_d.loading import EpochBatches  # noqa: E402
from crema_d_files import EMOTIONS, make_data, tone, write_wav  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("crema_d") / "data"
    make_data(root)
    return root


# --- sound ---


def test_a_wav_file_is_read_as_it_was_written(tmp_path):
    write_wav(tmp_path / "a.wav", [0.0, 0.5, -1.0, 0.25], rate=8000)
    samples, rate = audio.read_wav(tmp_path / "a.wav")
    assert rate == 8000
    torch.testing.assert_close(samples, torch.tensor([0.0, 0.5, -1.0, 0.25]), atol=1e-4, rtol=0)
    assert audio.wav_samples(tmp_path / "a.wav") == 4


def test_what_is_no_wav_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "b.wav").write_bytes(b"not a sound")
    for read in (audio.read_wav, audio.wav_samples):
        with pytest.raises(ValueError, match=r"b\.wav: expected a WAV file"):
            read(tmp_path / "b.wav")


def test_the_log_spectrogram_is_that_of_the_repeated_sound():
    samples = torch.tensor(tone(2, random.Random(0), seconds=0.7, rate=22_050))
    found = audio.log_spectrogram(samples)
    assert found.shape == (1, 257, 188)
    long = samples.repeat(5)
    for column in (1, 50, 100, 180):  # column 0 reaches over the beginning
        middle = column * 353
        part = long[middle - 256 : middle + 256] * torch.hann_window(512)
        expected = torch.log(torch.fft.rfft(part).abs() + 1e-7)
        torch.testing.assert_close(found[0, :, column], expected, atol=1e-3, rtol=1e-3)
    assert found[0, :, 60].argmax() == round(900 / 22_050 * 512)


# --- frames ---


# --- the data set ---


def test_clips_carry_label_and_speaker(folder):
    found = data.find_clips(folder)
    assert len(found.clips) == 36
    assert found.left_out == {}
    clip = found.clips["1003_S04_DIS_XX"]
    assert (clip.speaker, EMOTIONS[clip.label]) == ("1003", "DIS")
    assert [path.name[:5] for path in clip.frames] == ["00001", "00002"]


def test_incomplete_clips_are_left_out_with_the_reason(tmp_path):
    make_data(tmp_path, speakers=2, clips=3)
    for path in (tmp_path / "Image-01-FPS" / "1001_S00_NEU_XX").iterdir():
        path.unlink()
    write_wav(tmp_path / "AudioWAV" / "1001_S01_HAP_XX.wav", [])
    write_wav(tmp_path / "AudioWAV" / "noise.wav", [0.5])
    (tmp_path / "AudioWAV" / "1002_S02_SAD_XX.wav").write_bytes(b"?")
    found = data.find_clips(tmp_path)
    assert sorted(found.clips) == ["1001_S02_SAD_XX", "1002_S00_NEU_XX", "1002_S01_HAP_XX"]
    assert "no frames" in found.left_out["1001_S00_NEU_XX"]
    assert found.left_out["1001_S01_HAP_XX"] == "no sound"
    assert "SPEAKER_SENTENCE_EMOTION" in found.left_out["noise"]
    assert "expected a WAV" in found.left_out["1002_S02_SAD_XX"]


def test_no_speaker_is_in_two_splits(folder):
    found = data.find_clips(folder)
    for seed in range(5):
        splits = data.make_splits(found, None, 0.2, 0.34, seed)
        speakers = {name: {clip.speaker for clip in clips} for name, clips in splits.items()}
        assert [len(speakers[name]) for name in data.SPLITS] == [3, 1, 2]
        assert len(set.union(*speakers.values())) == 6
        assert sum(map(len, splits.values())) == 36
    first, again = (data.make_splits(found, None, 0.2, 0.2, 0) for _ in range(2))
    assert first == again
    tests = {data.make_splits(found, None, 0.2, 0.2, seed)["test"][0].speaker for seed in range(9)}
    assert len(tests) > 1


def write_list(path, names):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows((name, name.split("_")[2]) for name in names)
    return path


def test_published_lists_decide_what_is_test(folder, tmp_path):
    found = data.find_clips(folder)
    names = list(found.clips)
    lists = (
        write_list(tmp_path / "train.csv", names[:30]),
        write_list(tmp_path / "test.csv", names[30:]),
    )
    splits = data.make_splits(found, lists, 0.2, 0.2, 0)
    assert [clip.name for clip in splits["test"]] == names[30:]
    held = {clip.speaker for clip in splits["val"]}
    assert held
    assert held.isdisjoint(clip.speaker for clip in splits["train"])

    for names_, text, message in (
        (names[30:], "", "in the training list and in the test list"),
        (["1001_S00_ANG_XX"], "", "no clip"),
        (names[30:], f"{names[0]},ANG\n", "its name says otherwise"),
        (names[30:], f"{names[30]},NEU\n", "twice"),
    ):
        wrong = write_list(tmp_path / "wrong.csv", names_)
        wrong.write_text(wrong.read_text() + text)
        both = (wrong, lists[1]) if "test list" in message else (lists[0], wrong)
        with pytest.raises(data.DataError, match=message):
            data.make_splits(found, both, 0.2, 0.2, 0)


def test_augmentation_depends_on_epoch_and_row_alone(folder):
    clips = list(data.find_clips(folder).clips.values())
    options = {"image_size": 16, "frames": 2, "augment": True, "library": "own", "seed": 1}
    rows = data.Clips(clips, **options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rows[data.Row(1, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, later = rows[data.Row(1, 4)], rows[data.Row(2, 4)]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], later[1])
    assert not torch.equal(first[1], data.Clips(clips, **options | {"seed": 2})[data.Row(1, 4)][1])
    assert first[0].shape == (1, 257, 188)
    assert first[1].shape == (2, 3, 16, 16)
    assert first[2] == clips[4].label
    assert rows[data.Row(1, 4, counts=False)][2] == -100


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("length", "batch"), [(65, 12), (7, 6), (48, 12)])
def test_every_row_counts_once_an_epoch(world, length, batch):
    shares = [EpochBatches(length, batch, rank, world, seed=5) for rank in range(world)]
    for share in shares:
        share.epoch = 3
    batches = [list(share) for share in shares]
    assert {len(own) for own in batches} == {-(-length // batch)} == {len(shares[0])}
    rows = [row for own in batches for rows in own for row in rows if row.counts]
    assert sorted(row.index for row in rows) == list(range(length))
    assert {row.epoch for row in rows} == {3}
    for k, step in enumerate(zip(*batches, strict=True)):
        sizes = [len(own) for own in step]
        assert len(set(sizes)) == 1
        assert sum(sizes) <= batch + world
        assert sum(row.counts for own in step for row in own) == shares[0].counting()[k]
    assert max(map(len, batches[0])) - min(map(len, batches[0])) <= 1
    shares[0].epoch = 4
    assert list(shares[0]) != batches[0]

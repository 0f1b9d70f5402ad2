"""The CREMA-D example's data: sounds, frames, splits, batches."""

from __future__ import annotations

import csv
import random
import sys
import wave
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from crema_d import audio, data, images  # noqa: E402
from crema_d.loading import EpochBatches  # noqa: E402
from crema_d_files import EMOTIONS, make_data, tone, write_wav  # noqa: E402
from PIL import Image  # noqa: E402


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


@pytest.mark.parametrize(("width", "raw"), [(1, [0, 255, 192, 64]), (4, [-(2**31), 0, 2**30, 0])])
def test_other_sample_widths_and_stereo(tmp_path, width, raw):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16000)
        signed = width > 1
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=signed) for v in raw))
    scaled = [(v - 128) / 128 if width == 1 else v / 2**31 for v in raw]
    expected = torch.tensor([(scaled[0] + scaled[1]) / 2, (scaled[2] + scaled[3]) / 2])
    torch.testing.assert_close(audio.read_wav(tmp_path / "a.wav")[0], expected)


def test_what_is_no_wav_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "b.wav").write_bytes(b"not a sound")
    for read in (audio.read_wav, audio.wav_samples):
        with pytest.raises(ValueError, match=r"b\.wav: expected a PCM WAV file"):
            read(tmp_path / "b.wav")


@pytest.mark.parametrize("old_rate", [16_000, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_removes_what_does_not_fit(old_rate):
    def sine(rate, pitch):
        return torch.sin(2 * torch.pi * pitch * torch.arange(rate // 4) / rate)

    found = audio.resample(sine(old_rate, 1234.5), old_rate)
    assert len(found) == -(-(old_rate // 4) * 22_050 // old_rate)
    inner = slice(200, 5200)  # the ends see the silence outside
    torch.testing.assert_close(found[inner], sine(22_050, 1234.5)[inner], atol=2e-3, rtol=0)
    if old_rate > 40_000:
        assert audio.resample(sine(old_rate, 14_000.0), old_rate)[inner].abs().max() < 2e-3


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


def test_frames_are_spread_evenly_or_drawn_in_order():
    paths = [Path(str(k)) for k in range(5)]
    assert images.pick_frames(paths, 1, random=False) == [paths[2]]
    assert images.pick_frames(paths, 5, random=False) == paths
    assert images.pick_frames(paths[:2], 4, random=True) == [paths[k] for k in (0, 0, 1, 1)]
    torch.manual_seed(0)
    drawn = {tuple(images.pick_frames(paths, 2, random=True)) for _ in range(200)}
    assert drawn == {(a, b) for k, a in enumerate(paths) for b in paths[k + 1 :]}


def test_a_random_crop_lies_inside_and_varies():
    torch.manual_seed(0)
    boxes = [images.random_crop(40, 30) for _ in range(300)]
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= 40
        assert 0 <= upper < lower <= 30
        assert 0.55 < (right - left) / (lower - upper) < 1.8  # 3/4 to 4/3, rounded to pixels
    areas = [(right - left) * (lower - upper) / 1200 for left, upper, right, lower in boxes]
    assert min(areas) < 0.15
    assert max(areas) > 0.8
    assert images.random_crop(1000, 1)[3] == 1


def test_without_augmentation_the_whole_image_is_resized(folder):
    path = next(iter(data.find_clips(folder).clips.values())).frames[0]
    found = images.load_frames([path], 20, False, "own")
    with Image.open(path) as file:
        small = file.convert("RGB").resize((20, 20), Image.Resampling.BILINEAR)
    for x, y in ((0, 0), (19, 3), (7, 16)):
        expected = (torch.tensor(small.getpixel((x, y))) / 255 - images.MEAN.flatten()) / (
            images.STD.flatten()
        )
        torch.testing.assert_close(found[0, :, y, x], expected)


def test_all_frames_of_a_clip_share_crop_and_flip(folder):
    path = next(iter(data.find_clips(folder).clips.values())).frames[0]
    torch.manual_seed(3)
    draws = [images.load_frames([path, path], 16, True, "own") for _ in range(8)]
    assert all(torch.equal(a, b) for a, b in draws)
    assert len({draw.sum().item() for draw in draws}) == 8


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
    assert "PCM WAV" in found.left_out["1002_S02_SAD_XX"]


def test_no_speaker_is_in_two_splits(folder):
    found = data.find_clips(folder)
    for seed in range(5):
        splits = data.make_splits(found, None, 0.2, 0.34, seed)
        speakers = {name: {clip.speaker for clip in clips} for name, clips in splits.items()}
        assert [len(speakers[name]) for name in data.SPLITS] == [3, 1, 2]
        assert len(set.union(*speakers.values())) == 6
        assert sum(map(len, splits.values())) == 36
    assert data.make_splits(found, None, 0.2, 0.2, 0) == data.make_splits(found, None, 0.2, 0.2, 0)


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

"""Digits: the same bytes everywhere, nothing shared between splits, and noise as described."""

import io
import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer

from mmfast.data.prepare import digits, speech
from mmfast.data.shards import Dataset
from mmfast.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return digits.prepare_digits(tmp_path_factory.mktemp("digits") / "out", samples=(300, 60, 60))


def notes(index):
    return [json.loads(index.read(i, "json")) for i in range(len(index))]


def test_every_sample_has_its_three_components_and_its_label(made):
    dataset = Dataset.open(made)
    assert dataset.name == "digits" and dataset.classes == speech.WORDS
    assert {split: len(index) for split, index in dataset.splits.items()} == {
        "train": 300,
        "validation": 60,
        "test": 60,
    }
    for index in dataset.splits.values():
        assert set(index.labels) == set(range(10))
        for i, about in enumerate(notes(index)):
            assert (
                index.extensions(i) == ("png", "txt", "flac")
                and speech.WORDS[index.labels[i]] == about["label"]
            )
            assert Image.open(io.BytesIO(index.read(i, "image"))).size == (32, 32)
            wave, rate = soundfile.read(io.BytesIO(index.read(i, "audio")))
            assert rate == 8000 and 0.2 < len(wave) / rate < 1.0 and 0.1 < np.std(wave) < 0.2
            assert index.read(i, "text").decode() in speech.WORDS


def test_images_and_voices_are_disjoint_between_splits(made):
    seen = defaultdict(set)
    for split, index in Dataset.open(made).splits.items():
        for about in notes(index):
            seen["image", about["image"]].add(split)
            seen["voice", about["voice"]].add(split)
    assert len(seen) > 300 and all(len(splits) == 1 for splits in seen.values())


def test_the_word_is_random_in_forty_percent(made):
    index = Dataset.open(made).splits["train"]
    right = np.mean([index.read(i, "text").decode() == speech.WORDS[index.labels[i]] for i in range(300)])
    assert abs(right - 0.64) < 0.09  # 0.6 kept, and a tenth of the drawn ones happen to be right


def test_two_runs_give_the_same_bytes_and_another_seed_others(made, tmp_path):
    again = digits.prepare_digits(tmp_path / "again", samples=(300, 60, 60))
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 3 + 3 * 2
    assert all((made / name).read_bytes() == (again / name).read_bytes() for name in files)
    other = Dataset.open(digits.prepare_digits(tmp_path / "other", samples=(30, 6, 6), seed=1))
    assert other.splits["train"].read(0, "image") != Dataset.open(made).splits["train"].read(0, "image")


def test_a_second_call_does_nothing_and_other_arguments_are_told(made, tmp_path, capsys):
    before = (made / "train" / "000000.tar").stat().st_mtime_ns
    assert digits.prepare_digits(made, samples=(300, 60, 60)) == made
    assert "already prepared" in capsys.readouterr().err
    assert (made / "train" / "000000.tar").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made with other arguments \(seed was 0, is now 5\); --force"):
        digits.prepare_digits(made, samples=(300, 60, 60), seed=5)
    small = digits.prepare_digits(tmp_path / "small", samples=(5, 1, 1))
    digits.prepare_digits(small, samples=(6, 1, 1), force=True)
    assert len(Dataset.open(small).splits["train"]) == 6 and [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_damaged_dataset_is_not_taken_for_finished(tmp_path):
    made = digits.prepare_digits(tmp_path / "out", samples=(5, 1, 1))
    with open(made / "train" / "000000.tar", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"000000\.tar: cut short.*--force makes it again"):
        digits.prepare_digits(made, samples=(5, 1, 1))


def test_force_never_replaces_a_folder_that_is_no_dataset(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is there and is no prepared dataset"):
        digits.prepare_digits(tmp_path, samples=(5, 1, 1), force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_noise_has_the_power_it_says():
    wave = np.sin(np.arange(8000) * 0.2).astype(np.float32)
    rng = np.random.default_rng(0)
    for snr in (0.0, 10.0):
        noisy, _ = soundfile.read(io.BytesIO(digits.noisy_speech(wave, snr, rng)))
        scale = noisy @ wave / (wave @ wave)
        power = np.sum((scale * wave) ** 2) / np.sum((noisy - scale * wave) ** 2)
        assert abs(10 * np.log10(power) - snr) < 0.5
    grey = Image.open(io.BytesIO(digits.noisy_image(np.full((8, 8), 8.0), rng)))
    cells = np.asarray(grey)[::4, ::4] / 255 * 16
    assert (
        np.array_equal(np.asarray(grey), cells.repeat(4, 0).repeat(4, 1) * 255 / 16)
        and 3.5 < cells.std() < 6.5
    )


def test_digit_words_are_one_token_each(made):
    tokenizer = Tokenizer.from_file(str(Dataset.open(made).tokenizer_path))
    assert tokenizer.token_to_id("[PAD]") == 0 and tokenizer.token_to_id("[UNK]") == 1
    assert all(len(tokenizer.encode(word.upper()).ids) == 1 for word in speech.WORDS)
    assert tokenizer.encode("日").ids[-1] == 1


def test_the_shipped_clips_are_small_and_whole():
    clips = speech.load_clips()
    assert len(clips) == 48 and all(len(words) == 10 for words in clips.values())
    assert sum(path.stat().st_size for path in speech.CLIPS.iterdir()) < 1_500_000
    assert all(
        0.2 < len(wave) / speech.RATE < 1 and np.abs(wave).max() > 0.75 for v in clips.values() for wave in v
    )
    assert "synthetic" in (speech.CLIPS / "digits.json").read_text()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_shipped_clips_can_be_made_again():
    voice = speech.voices()[7]
    for word, shipped in list(zip(speech.WORDS, speech.load_clips()[voice.variant], strict=True))[:3]:
        assert abs(len(speech.synthesise(voice, word)) - len(shipped)) < 80


def test_more_voices_without_espeak_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="espeak-ng is not installed"):
        digits.prepare_digits(tmp_path / "out", more_voices=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("samples", [(0, 1, 1), (1, 1)])
def test_bad_sample_counts_are_named(tmp_path, samples):
    with pytest.raises(UserError, match="wanted three numbers"):
        digits.prepare_digits(tmp_path / "out", samples=samples)

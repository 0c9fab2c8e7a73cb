"""Descriptions of modalities refuse what cannot work, and say what their tensors look like."""

import subprocess
import sys

import pytest
import torch

from mmfast.data import Audio, DataConfig, Image, Modality, Text
from mmfast.errors import UserError


def test_shapes_follow_from_the_description():
    assert Image(size=32).shape == (3, 32, 32)
    assert Text(max_tokens=7).shape == (7,) and Text().dtype == torch.int64
    assert Audio(sample_rate=8000, hop=80, n_mels=20, max_seconds=1.5).shape == (20, 151)


def test_empty_images_are_channels_last():
    empty = Image(size=8).empty(2)
    assert empty.shape == (2, 3, 8, 8) and empty.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Image(size=0), "Image.size: got 0"),
        (lambda: Image(crop_scale=(0.9, 0.5)), "Image.crop_scale"),
        (lambda: Image(std=(1.0, 0.0, 1.0)), "Image.std"),
        (lambda: Text(max_tokens=-1), "Text.max_tokens: got -1"),
        (lambda: Audio(hop=0), "Audio.hop: got 0"),
        (lambda: Audio(max_seconds=0.001), "Audio.max_seconds"),
        (lambda: Audio(max_seconds=float("inf")), "Audio.max_seconds: got inf"),
        (lambda: Audio(max_seconds=float("nan")), "Audio.max_seconds: got nan"),
        (lambda: Audio(floor=float("nan")), "Audio.floor: got nan"),
        (lambda: Image(std=(1.0, float("nan"), 1.0)), "Image.std"),
        (lambda: Image(mean=(1.0, float("inf"), 1.0)), "Image.mean"),
        (lambda: DataConfig(path="x", modalities={}), "data.modalities: got none"),
        (lambda: DataConfig(path="x", modalities={"label": Text()}), "'label' is a key of every batch"),
        (
            lambda: DataConfig(path="x", modalities={"a": Text()}, seed=2**70),
            "data.seed: got 1180591620717411303424",
        ),
        (lambda: DataConfig(path="x", modalities={"a": Text()}, decoder="gpu"), "data.decoder: got 'gpu'"),
        (lambda: DataConfig(path="x", modalities={"a": Text()}, device="tpu"), "data.device: got 'tpu'"),
        (lambda: DataConfig(path="x", modalities={"a": Text()}, prefetch=0), "data.prefetch: got 0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_yaml_can_hold_the_modalities():
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(subclasses_enabled=[Modality])
    parser = ArgumentParser()
    parser.add_argument("--data", type=DataConfig)
    yaml = """{path: there, modalities: {
        front: {class_path: mmfast.data.Image, init_args: {size: 48}},
        words: {class_path: mmfast.data.Text, init_args: {max_tokens: 9}}}}"""
    config = parser.instantiate(parser.parse_args([f"--data={yaml}"])).data
    assert config.modalities == {"front": Image(size=48), "words": Text(max_tokens=9)}


def test_dali_is_imported_only_when_it_is_used():
    code = "import sys, mmfast, mmfast.data; sys.exit(any(m.startswith('nvidia.dali') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

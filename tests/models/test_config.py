from dataclasses import dataclass

import pytest
import torch
from jsonargparse import ArgumentParser
from parts import CONFIG, Data, make, make_batch

from mmfast.data.modality import Image
from mmfast.errors import UserError
from mmfast.models import (
    ArticleConfig,
    Attention,
    AudioTransformer,
    Concat,
    FusionConfig,
    FusionModel,
    ImageResNet,
    ModelConfig,
    TextTransformer,
)

YAML = """
model:
  encoders:
    photo: {class_path: ImageResNet, init_args: {width: 16, depths: [1, 2], groups: 8}}
    words: {class_path: TextTransformer, init_args: {dim: 32, heads: 2}}
    sound: {class_path: AudioTransformer}
  fusion: {class_path: Concat, init_args: {dim: 64, activation: relu}}
  dropout: 0.2
  modality_dropout: 0.3
"""


def parse(tmp_path, text, *arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=ModelConfig)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return parser.instantiate(parser.parse_args(["--config", str(file), *arguments])).model


def test_yaml_says_what_python_says(tmp_path):
    assert parse(tmp_path, YAML) == ModelConfig(
        encoders={
            "photo": ImageResNet(width=16, depths=(1, 2), groups=8),
            "words": TextTransformer(dim=32, heads=2),
            "sound": AudioTransformer(),
        },
        fusion=Concat(dim=64, activation="relu"),
        dropout=0.2,
        modality_dropout=0.3,
    )


def test_a_fusion_by_attention_is_one_word_in_the_yaml(tmp_path):
    text = YAML.replace("{class_path: Concat, init_args: {dim: 64, activation: relu}}", "Attention")
    assert parse(tmp_path, text).fusion == Attention()
    text = YAML.replace("Concat, init_args: {dim: 64, activation: relu}", "Attention, init_args: {heads: 2}")
    assert parse(tmp_path, text).fusion == Attention(heads=2)


def test_every_key_can_be_set_on_the_command_line(tmp_path):
    model = parse(tmp_path, YAML, "--model.encoders.photo.init_args.width=32", "--model.dropout=0")
    assert model.encoders["photo"].width == 32 and model.dropout == 0


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        ("width: 16", "wdth: 16", "wdth"),
        ("dim: 32", "dmi: 32", "dmi"),
        ("dropout: 0.2", "droput: 0.2", "droput"),
        ("ImageResNet", "ImageResnet", "ImageResnet"),
        ("width: 16", "width: wide", "wide"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_it(tmp_path, good, bad, named):
    with pytest.raises(Exception, match=named):
        parse(tmp_path, YAML.replace(good, bad, 1))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: ModelConfig(encoders={}), "model.encoders: got none"),
        (lambda: ModelConfig(encoders=CONFIG.encoders, dropout=1.0), "model.dropout: got 1.0"),
        (
            lambda: ModelConfig(encoders=CONFIG.encoders, modality_dropout=-1),
            "model.modality_dropout: got -1",
        ),
        (lambda: ImageResNet(width=48), "ImageResNet.groups: got 32"),
        (lambda: ImageResNet(depths=()), "ImageResNet.depths: got 0"),
        (lambda: ImageResNet(stem="tiny"), "ImageResNet.stem: got 'tiny'"),
        (lambda: TextTransformer(dim=100, heads=3), "TextTransformer.heads: got 3"),
        (lambda: AudioTransformer(layers=0), "AudioTransformer.layers: got 0"),
        (lambda: Concat(activation="tanh"), "Concat.activation: got 'tanh'"),
        (
            lambda: make(ModelConfig(encoders={"smell": TextTransformer()})),
            "model.encoders.smell: no such modality",
        ),
        (
            lambda: make(ModelConfig(encoders={"image": TextTransformer()})),
            "TextTransformer encodes token ids",
        ),
        (
            lambda: make(ModelConfig(encoders={"text": AudioTransformer()})),
            "AudioTransformer encodes log-mel",
        ),
        (lambda: make(ModelConfig(encoders={"audio": ImageResNet()})), "ImageResNet encodes images"),
        (lambda: make(data=Data(num_classes=0)), "the dataset has 0 classes; wanted 1 or more"),
        *[
            (
                lambda name=name: make(ArticleConfig(), Data(modalities={name: Image()})),
                f"got the name '{name}', wanted one without dots",
            )
            for name in ("values", "cam.left", "")
        ],
    ],
)
def test_what_cannot_work_is_refused_by_name(build, named):
    with pytest.raises(UserError, match=named) as error:
        build()
    assert "\n" not in str(error.value)


def test_the_default_image_encoder_is_as_large_as_resnet_18():
    encoder = ImageResNet().build(Image(), vocab_size=0)
    assert encoder.dim == 512
    assert (
        sum(p.numel() for p in encoder.parameters()) == 11_176_512
    )  # torchvision's resnet18 less its last layer


def test_a_new_fusion_is_a_new_config_and_nothing_else():
    class MeanOfMeans(torch.nn.Module):
        dim = 8

        def forward(self, features, present):
            means = [sequence.mean(dim=1)[:, :8] for sequence, _ in features.values()]
            return torch.where(present[..., None], torch.stack(means, dim=1), 0.0).mean(dim=1)

    @dataclass(frozen=True, kw_only=True)
    class Mean(FusionConfig):
        def build(self, dims):
            assert dims == {"image": 16, "text": 12, "audio": 8}
            return MeanOfMeans()

    model = make(ModelConfig(encoders=CONFIG.encoders, fusion=Mean()))
    assert isinstance(model, FusionModel)
    assert model(make_batch())["label"].shape == (5, 4)


def test_the_articles_model_takes_any_modalities_by_shape():
    cameras = Data(modalities={"left": Image(size=16), "right": Image(size=12)})
    model = make(ArticleConfig(dim=8), cameras)
    batch = {name: torch.randn(2, *m.shape) for name, m in cameras.modalities.items()}
    ones = torch.ones(2, 2, dtype=torch.int64)
    assert model({**batch, "lengths": ones, "present": ones > 0})["label"].shape == (2, 4)

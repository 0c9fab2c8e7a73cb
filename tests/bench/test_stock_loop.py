"""The peer of our training loop is a fair one: the same tensors, the same model, learning, and no free batches."""

import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from loading import MODALITIES, holes, open_data, parts, write_dataset

from mmfast.bench.stock_loop import StockDataset, StockLoop
from mmfast.data import DataConfig
from mmfast.models.build import build_model
from mmfast.models.config import AudioTransformer, Concat, ImageResNet, ModelConfig, TextTransformer
from mmfast.train import TrainerConfig
from mmfast.train.optim import learning_rate

MODEL = ModelConfig(
    encoders={
        "image": ImageResNet(width=8, depths=(1, 1), groups=4),
        "text": TextTransformer(dim=16, layers=1, heads=2),
        "audio": AudioTransformer(dim=16, layers=1, heads=2),
    },
    fusion=Concat(dim=16),
    dropout=0.0,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Beside its workers; a spinning pool makes nothing faster here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    samples = holes([parts(n) for n in range(26)])
    return write_dataset(
        tmp_path_factory.mktemp("stock") / "tiny", {"train": samples, "validation": samples[:4]}
    )


@pytest.fixture(scope="module")
def config(path):
    return DataConfig(path=str(path), modalities=MODALITIES)


def test_it_feeds_the_model_what_our_loader_feeds_it(path, config):
    dataset = StockDataset(config, multiprocessing.Value("q", 0))
    with open_data(path).loader("train", batch_size=8, train=True) as loader:
        ours = next(loader)
    stock = dataset.collate([dataset[int(n)] for n in ours["id"]])
    assert stock.keys() == ours.keys()
    for key in ("lengths", "present", "label", "id"):
        assert torch.equal(stock[key], ours[key]), key
    assert stock["image"].shape == ours["image"].shape  # its crops are its own
    tokens, frames = stock["text"].shape[1], stock["audio"].shape[2]  # padded to the longest only
    assert torch.equal(stock["text"], ours["text"][:, :tokens])
    torch.testing.assert_close(stock["audio"], ours["audio"][:, :, :frames], rtol=1e-3, atol=1e-3)
    assert tokens == max(stock["lengths"][:, 1]) and frames == max(stock["lengths"][:, 2])


def test_a_batch_without_a_modality_still_has_its_key(config):
    dataset = StockDataset(config, multiprocessing.Value("q", 0))
    alone = next(n for n in range(len(dataset)) if len(dataset[n]) == 3)  # nothing but a sound
    batch = dataset.collate([dataset[alone]])
    assert batch["image"].shape == (1, 3, 24, 24) and not batch["image"].any()
    assert batch["present"].tolist() == [[False, False, True]]


def test_it_learns_and_counts_its_steps(path, config):
    torch.manual_seed(0)
    loop = StockLoop(
        config, build_model(MODEL, open_data(path)), TrainerConfig(batch_size=8, lr=3e-3), workers=1
    )
    try:
        assert loop.steps(10) > 0
        assert loop.steps(10) > 0
    finally:
        loop.close()
    assert len(loop.losses) == 20
    assert np.mean(loop.losses[-5:]) < np.mean(loop.losses[:5])


def test_workers_are_idle_between_turns(path, config):
    loop = StockLoop(
        config, build_model(MODEL, open_data(path)), TrainerConfig(batch_size=4, lr=0.0), workers=1
    )
    try:
        loop.steps(3)
        made = loop._made.value
        time.sleep(0.2)
        assert loop._made.value == made == 3 + loop._ahead
    finally:
        loop.close()


def test_a_sample_that_does_not_decode_is_an_error_and_not_a_wait(tmp_path):
    bad = {**parts(1), "png": b"no image"}
    path = write_dataset(tmp_path / "bad", {"train": [bad] * 8, "validation": [parts(2)]})
    config = DataConfig(path=str(path), modalities=MODALITIES)
    loop = StockLoop(
        config, build_model(MODEL, open_data(path)), TrainerConfig(batch_size=4, lr=0.0), workers=1
    )
    try:
        with pytest.raises(Exception, match="cannot identify image file"):
            loop.steps(1)
    finally:
        loop.close()


def test_it_follows_our_schedule_and_is_tested_on_our_batches(path, config):
    trainer = TrainerConfig(out="unused", batch_size=8, max_steps=6, warmup=2, lr=3e-3, clip=1e-6)
    data = open_data(path)
    loop = StockLoop(config, build_model(MODEL, data), trainer, workers=1)
    try:
        loop.steps(2)
        assert loop._optimizer.param_groups[0]["lr"] == learning_rate(trainer, 1)
        norm = torch.stack([p.grad.norm() for p in loop.model.parameters() if p.grad is not None]).norm()
        assert norm <= 1.01e-6
        with data.loader("validation", batch_size=4, train=False) as batches:
            batch = next(batches)
            wrong = dict(batch, label=loop.model.eval()(batch)["label"].argmax(-1))
        assert loop.accuracy([wrong]) == 1.0
        wrong["label"] = wrong["label"].clone()
        wrong["label"][0] = (wrong["label"][0] + 1) % data.num_classes
        wrong["label"][1] = -1  # not counted
        assert loop.accuracy([wrong]) == (len(wrong["label"]) - 2) / (len(wrong["label"]) - 1)
    finally:
        loop.close()

"""The step: schedule, sums and counts, accumulation, clipping, precision, interruption by a bad loss."""

import json
import math

import pytest
import torch
from torch import nn
from toy import ToyData, ToyModel, toy_config, toy_model

from mmfast.errors import UserError
from mmfast.train import Task, Trainer, category, parallelize, start
from mmfast.train.optim import adamw, clip, learning_rate
from mmfast.train.parallel import compute_dtype, sharded


def run(config, data=None, tasks=None, steps=6):
    """Train for some steps; returns the weights and each step's values."""
    trainer = Trainer(config, tasks or (category(),), quiet=True)
    model = trainer.parallelize(toy_model(config))
    optimizer = adamw(model, config.trainer)
    with trainer.loader(data or ToyData(), "train") as loader:
        values = [
            s.values for _, s in zip(range(steps), trainer.steps(model, optimizer, loader), strict=False)
        ]
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return weights, torch.stack(values)


def test_learning_rate_warms_up_then_falls_to_its_share(tmp_path):
    config = toy_config(tmp_path, warmup=10, max_steps=110, lr=2.0, final_lr=0.1).trainer
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[110] == pytest.approx(0.2) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(toy_config(tmp_path, warmup=0).trainer, 0) == 1e-2


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_big_batch(tmp_path, parts):
    whole, values = run(toy_config(tmp_path, precision="fp64"))
    cut, cut_values = run(toy_config(tmp_path, precision="fp64", accumulate=parts))
    assert torch.allclose(values, cut_values, rtol=0, atol=1e-11)
    for name in whole:
        assert torch.allclose(whole[name], cut[name], rtol=0, atol=1e-11), name


def test_sharded_training_equals_plain_pytorch(tmp_path):
    config = toy_config(tmp_path, precision="fp64", clip=0.5)
    sharded_weights, values = run(config, steps=5)
    model = toy_model(config).double()
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        weight_decay=0.05,
    )
    loader = iter(ToyData().loader("train", batch_size=8, train=True))
    for step in range(5):
        batch = {k: v.double() if v.is_floating_point() else v for k, v in next(loader).items()}
        loss = torch.nn.functional.cross_entropy(model(batch)["label"], batch["label"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.trainer, step)
        optimizer.step()
        optimizer.zero_grad()
        assert values[step].tolist() == pytest.approx([loss.item(), norm.item()], abs=1e-10)
    for name, p in model.named_parameters():
        assert torch.allclose(p, sharded_weights[name], rtol=0, atol=1e-9), name


def test_clip_scales_to_the_norm_and_leaves_small_gradients(tmp_path):
    model = parallelize(ToyModel(), start("cpu"), "fp32")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters())
    assert clip(model, 0.0).item() == pytest.approx(math.sqrt(count))
    assert clip(model, 1e9).item() == pytest.approx(math.sqrt(count))
    assert all(bool((p.grad.full_tensor() == 1).all()) for p in model.parameters())
    clip(model, 2.0)
    assert clip(model, 0.0).item() == pytest.approx(2.0, rel=1e-5)


def test_the_norm_of_millions_of_gradients_is_exact(tmp_path):
    model = nn.Sequential(nn.Linear(1500, 1500))
    parallelize(model, start("cpu"), "fp32")
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        p.grad.to_local().normal_(std=1e-3)
    exact = math.sqrt(sum(p.grad.to_local().double().square().sum().item() for p in model.parameters()))
    assert clip(model, 0.0).item() == pytest.approx(exact, rel=1e-6)


def test_norms_and_biases_do_not_decay(tmp_path):
    model = toy_model(config := toy_config(tmp_path))
    decay = {
        id(p): group["weight_decay"]
        for group in adamw(model, config.trainer).param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if "norm" in name or "bias" in name or "scale" in name else 0.05), name


def test_a_rank_without_labels_has_a_finite_loss(tmp_path):
    data = ToyData()
    loader = data.loader("train", batch_size=8, train=True)
    batch = next(iter(loader)) | {"label": torch.full((8,), -1)}
    trainer = Trainer(config := toy_config(tmp_path), quiet=True)
    model = trainer.parallelize(toy_model(config))
    step = next(trainer.steps(model, adamw(model, config.trainer), iter([batch])))
    assert step.values.tolist() == [0.0, 0.0]


def test_several_tasks_add_up_with_their_weights(tmp_path):
    def squares(y, batch):
        return y.double().square().sum()

    def rows(batch):
        return batch["id"].ge(0).sum()

    small = Task("label", squares, rows, weight=0.25, scores={})
    config = toy_config(tmp_path, max_steps=1, log_every=1, validate_every=1, best="loss", precision="fp64")
    trainer = Trainer(config, (category(), small), quiet=True)
    result = trainer.fit(toy_model(config), ToyData())
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    model, batch = toy_model(config).double(), next(iter(ToyData().loader("train", batch_size=8, train=True)))
    y = model(batch | {"image": batch["image"].double()})["label"]
    expected = torch.nn.functional.cross_entropy(y, batch["label"]) + 0.25 * y.square().sum() / 8
    assert line["loss"] == result.loss == pytest.approx(expected.item(), abs=1e-12)


def test_every_part_is_sharded_at_world_size_one(tmp_path):
    model = parallelize(ToyModel(), start("cpu"), "fp32")
    assert len(list(sharded(model))) == 5  # two encoders, the fusion, the head, the whole
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path):
    seen = []
    model = ToyModel()
    model.encoders["image"].conv.register_forward_hook(lambda m, x, y: seen.append((m.weight.dtype, y.dtype)))
    parallelize(model, start("cpu"), "bf16")
    batch = next(iter(ToyData().loader("train", batch_size=8, train=True)))
    y = model(batch)["label"]
    y.sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] and y.dtype == torch.float32
    assert (
        {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    )


def test_auto_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert compute_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.inductor
def test_compiled_parts_train_alike_and_keep_their_names(tmp_path):
    plain, values = run(toy_config(tmp_path), steps=2)
    compiled, compiled_values = run(toy_config(tmp_path, compile=True), steps=2)
    assert plain.keys() == compiled.keys()
    assert torch.allclose(values, compiled_values, rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path):
    config = toy_config(tmp_path, lr=1e30, clip=0.0, log_every=2)
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf)"):
        Trainer(config, quiet=True).fit(toy_model(config), ToyData())
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path):
    task = Task(
        "label", lambda y, batch: (y * 0).square().sum().sqrt(), lambda batch: batch["label"].ge(0).sum()
    )
    config = toy_config(tmp_path, max_steps=1)
    with pytest.raises(UserError, match=r"the gradient's norm of step 1 is nan"):
        Trainer(config, [task], quiet=True).fit(toy_model(config), ToyData())
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "fault",
    [
        {"batch_size": 0},
        {"lr": -1.0},
        {"precision": "fp16"},
        {"precision": "fp8"},
        {"stop_after": 0},
        {"betas": (1.0, 2.0)},
        {"seed": 2**70},
    ],
)
def test_a_setting_that_means_nothing_is_named(tmp_path, fault):
    with pytest.raises(UserError, match=f"trainer.{next(iter(fault))}"):
        toy_config(tmp_path, **fault)


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"trainer.batch_size is 8; wanted a multiple of 3"):
        Trainer(toy_config(tmp_path, accumulate=3))

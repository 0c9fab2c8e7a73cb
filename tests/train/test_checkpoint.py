"""Checkpoints: whole or not there, complete enough to go on to the bit, and refused where they do not fit."""

import errno
import json
import os
import pickle
import re
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import ToyData, toy_config, toy_model

from mmfast.errors import UserError
from mmfast.train import Interrupted, Trainer, checkpoint
from mmfast.train.log import Log


def fit(config, data=None, **options):
    trainer = Trainer(config, quiet=True)
    model = toy_model(config)
    return trainer.fit(model, data or ToyData(), **options), model


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    options = {"dropout": 0.3, "max_steps": 16, "accumulate": 2}
    _, through = fit(toy_config(tmp_path / "a", **options))
    fit(toy_config(tmp_path / "b", stop_after=7, **options))
    _, resumed = fit(toy_config(tmp_path / "b", resume="latest", **options))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 16
    for (name, p), q in zip(through.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name


def test_a_run_that_died_after_its_checkpoint_takes_the_steps_again(tmp_path):
    config = {"max_steps": 12, "checkpoint_every": 5, "log_every": 1}

    def die(step):
        if step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fit(toy_config(tmp_path, **config), on_step=die)
    before = losses(tmp_path)
    assert max(before) == 8
    fit(toy_config(tmp_path, resume="latest", **config))
    after = losses(tmp_path)
    assert sorted(after) == list(range(1, 13)) and all(after[step] == before[step] for step in before)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 12


@pytest.mark.parametrize("where", ["fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_while_writing_leaves_the_one_before(tmp_path, where, error):
    fit(toy_config(tmp_path, max_steps=3))

    def fail(*arguments):
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt)) as caught:
        spoil = (os, "fsync") if where == "fsync" else (checkpoint.Path, "rename")
        fit(
            toy_config(tmp_path, max_steps=6, resume="latest"),
            on_step=lambda step: step == 5 and patch.setattr(*spoil, fail),
        )
    if isinstance(error, OSError):
        line = f"cannot write the checkpoint {tmp_path}/checkpoints/step-00000006: [Errno 28] No space left on device"
        assert (
            re.sub(r" \(\d+ MiB are free\)", "", str(caught.value))
            == f"{line}; {tmp_path}/checkpoints/step-00000003 is whole"
        )
    assert checkpoint.find(tmp_path, "latest").name == "step-00000003"
    result, _ = fit(toy_config(tmp_path, max_steps=6, resume="latest"))
    assert result.steps == 6 and names(tmp_path) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 1}, "trainer.seed was 0, now 1"),
        ({"batch_size": 4}, "trainer.batch_size was 8, now 4"),
        ({"dropout": 0.5}, "model.dropout was 0.0, now 0.5"),
    ],
)
def test_a_job_that_is_not_the_same_is_refused(tmp_path, change, line):
    fit(toy_config(tmp_path, max_steps=2))
    with pytest.raises(UserError, match=line):
        fit(toy_config(tmp_path, max_steps=4, resume="latest", **change))


def test_another_order_of_modalities_is_refused(tmp_path):
    """Weights over several modalities have the same shape in any order."""
    fit(config := toy_config(tmp_path, max_steps=2))
    data = replace(config.data, modalities=dict(reversed(config.data.modalities.items())))
    swapped = replace(config, data=data, trainer=replace(config.trainer, max_steps=4, resume="latest"))
    line = r"data.modalities was \['image', 'text'\], now \['text', 'image'\]"
    for use in (fit, lambda config: Trainer(config, quiet=True).load(toy_model(config))):
        with pytest.raises(UserError, match=line):
            use(swapped)


def test_other_data_is_refused(tmp_path):
    fit(toy_config(tmp_path, max_steps=2))
    with pytest.raises(UserError, match=r"cannot resume from .*data fingerprint was"):
        fit(toy_config(tmp_path, max_steps=4, resume="latest"), ToyData(sizes={"train": 36}))


def test_the_last_ones_and_the_best_are_kept(tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.5, 0.9, 0.1, 0.3])

    def evaluate(self, *_):
        return {"accuracy": next(scores)}

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    config = toy_config(tmp_path, max_steps=6, validate_every=1, checkpoint_every=1, keep=2)
    fit(config)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert checkpoint.find(tmp_path, "best").name == "step-00000002"
    assert checkpoint.find(tmp_path, "latest").name == "step-00000006"


def test_best_is_remembered_over_a_resume(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(Trainer, "_evaluate", lambda *_: {"accuracy": next(scores)})
    options = {"max_steps": 4, "validate_every": 1, "keep": 1}
    fit(toy_config(tmp_path, stop_after=2, **options))
    fit(toy_config(tmp_path, resume="latest", **options))
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


def test_weights_come_back_for_a_test(tmp_path):
    config = toy_config(tmp_path, max_steps=5, validate_every=5)
    trainer = Trainer(config, quiet=True)
    trainer.fit(model := toy_model(config), ToyData())
    fresh = trainer.load(toy_model(toy_config(tmp_path, seed=5)))
    assert trainer.test(fresh, ToyData()) == trainer.test(model, ToyData())


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(config := toy_config(tmp_path, max_steps=2))
    shard = next((tmp_path / "checkpoints" / "step-00000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"cannot read the checkpoint .*__0_0.distcp has .* bytes, wanted"
    ) as caught:
        Trainer(config, quiet=True).load(toy_model(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("run.json", b"{}", r"run.json is damaged: wanted step, job, validation, got {}"),
        ("run.json", b"[]", r"run.json is damaged: wanted step, job, validation, got \[\]"),
        ("run.json", b"\xff", r"run.json is damaged: 'utf-8' codec can't decode"),
        (".metadata", b"", r"cannot read the checkpoint .*: .metadata is damaged: EOFError"),
        (".metadata", b"hello world", r"cannot read the checkpoint .*: .metadata is damaged: UnpicklingError"),
        (".metadata", pickle.dumps([]), r"cannot read the checkpoint .*: .metadata is damaged: AttributeError"),
        ("__0_0.distcp", None, r"cannot read the checkpoint .*: a file is damaged"),
    ],
)  # fmt: skip
def test_damage_is_told_in_one_line(tmp_path, file, content, line):
    result, _ = fit(toy_config(tmp_path, max_steps=2))
    path = result.checkpoint / file
    path.write_bytes(bytes(path.stat().st_size) if content is None else content)
    with pytest.raises(UserError, match=line) as caught:
        fit(toy_config(tmp_path, max_steps=4, resume="latest"))
    assert "\n" not in str(caught.value)


def test_an_older_checkpoint_that_is_damaged_is_passed_over_and_told(tmp_path, capsys):
    fit(toy_config(tmp_path, max_steps=4, checkpoint_every=2))
    (tmp_path / "checkpoints" / "step-00000002" / "run.json").unlink()
    result, _ = fit(toy_config(tmp_path, max_steps=6, resume="latest"))
    assert result.steps == 6
    told = f"mmfast: {tmp_path}/checkpoints/step-00000002 is not a checkpoint: it has no run.json; it is passed over\n"
    assert capsys.readouterr().err == told


def test_a_full_disk_hides_no_earlier_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left"):
        fit(toy_config(tmp_path / "a", max_steps=2))
    with pytest.raises(ZeroDivisionError):
        fit(toy_config(tmp_path / "b", max_steps=2), on_step=lambda _: 1 / 0)
    log = Log(tmp_path / "c", first=0, last=1, active=True)
    with pytest.raises(UserError):
        log.close()
    assert log.file.closed


def test_a_folder_in_use_is_refused_or_overwritten(tmp_path):
    fit(toy_config(tmp_path, max_steps=4))
    with pytest.raises(UserError, match=r"already holds checkpoints up to step 4"):
        fit(toy_config(tmp_path, max_steps=2))
    time.sleep(1)  # TensorBoard reads the files of a folder in the order of the seconds in their names
    fit(toy_config(tmp_path, max_steps=2, overwrite=True))
    assert names(tmp_path) == ["step-00000002"] and sorted(losses(tmp_path)) == [1, 2]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batch_size": 4}, "trainer.batch_size was 8, now 4"),
        ({"max_steps": 2}, "step 2 of 2 is reached already"),
        ({"validate_every": 1, "best": "acuracy"}, "trainer.best is 'acuracy'; validation has accuracy, loss, count"),
    ],
)  # fmt: skip
def test_a_refused_run_overwrites_nothing(tmp_path, change, line):
    fit(toy_config(tmp_path, max_steps=6, checkpoint_every=2, keep=9))
    before = names(tmp_path)
    path = str(tmp_path / "checkpoints" / before[0])
    with pytest.raises(UserError, match=line):
        fit(toy_config(tmp_path, resume=path, overwrite=True, **change))
    assert names(tmp_path) == before
    fit(toy_config(tmp_path, resume=path, overwrite=True, max_steps=4))
    assert names(tmp_path) == before[:2]


def test_a_run_without_a_validation_split_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(KeyError, match="validation"):  # as the toy has it
        fit(toy_config(tmp_path, validate_every=9), ToyData(sizes={"train": 37}))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_killed_run_has_the_validation_of_its_last_checkpoint(tmp_path, monkeypatch):
    saved = checkpoint.save
    seen = []

    def save(*arguments, **options):
        seen.append((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        return saved(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    fit(toy_config(tmp_path, max_steps=2, validate_every=2))
    assert json.loads(seen[0])["kind"] == "validation"


def test_latest_of_nothing_begins_anew_and_a_wrong_path_is_named(tmp_path):
    fit(toy_config(tmp_path / "new", max_steps=2, resume="latest"))
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere"):
        fit(toy_config(tmp_path / "other", resume="nowhere"))
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no run.json"):
        fit(toy_config(tmp_path / "other", resume=str(tmp_path)))


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path):
    def press(step):
        if step == 3:
            os.kill(os.getpid(), 2)

    with pytest.raises(
        Interrupted, match=r"stopped after step 3; --resume goes on from .*step-00000003"
    ) as caught:
        fit(toy_config(tmp_path, max_steps=9), on_step=press)
    assert caught.value.signum == 2 and names(tmp_path) == ["step-00000003"]
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_ctrl_c_in_the_last_step_lets_the_run_end(tmp_path):
    config = toy_config(tmp_path, max_steps=3, validate_every=9)
    result, _ = fit(config, on_step=lambda step: step == 3 and os.kill(os.getpid(), 2))
    assert "accuracy" in result.metrics


@pytest.mark.parametrize("at", [3, 9])
def test_what_could_not_be_read_is_told_at_every_end(tmp_path, capsys, at):
    class Broken(ToyData):
        def loader(self, *arguments, **options):
            made = super().loader(*arguments, **options)
            made.ledger["train", "key", "image", "why"] = 1
            return made

    config = toy_config(tmp_path, max_steps=9)
    with suppress(Interrupted):
        press = lambda step: step == at and os.kill(os.getpid(), 2)  # noqa: E731
        Trainer(config).fit(toy_model(config), Broken(), on_step=press)
    assert "1 components could not be read" in capsys.readouterr().err

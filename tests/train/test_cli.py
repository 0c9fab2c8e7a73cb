"""The command on real files: every word of it, and one clear line for every mistake."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import ROOT, Command, dataset, options

from mmfast.cli import COMMANDS, main
from mmfast.train import checkpoint, load_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("tiny"))


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def altered(data, to, labels=None, **facts):
    """A copy of a dataset with other facts, and with ``labels`` for all that it has."""
    shutil.copytree(data, to)
    about = json.loads((to / "dataset.json").read_text())
    (to / "dataset.json").write_text(json.dumps(about | facts))
    for path in to.glob("*/index.npz") if labels is not None else ():
        columns = dict(np.load(path))
        np.savez(path, **columns | {"label": np.full_like(columns["label"], labels)})
    return to


def said(capsys, *arguments):
    """What a command that fails prints, which must be one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    line = capsys.readouterr().err
    assert line.startswith("mmfast: error: ") and line.count("\n") == 1
    return line


def test_fit_test_predict_and_resume_from_the_command_line(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["fit", *options(data, out, trainer__max_steps=6, trainer__validate_every=3)]) == 0
    assert "step 6, accuracy" in capsys.readouterr().out
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6] and list(out.glob("events.out.tfevents.*"))
    assert main(["test", *options(data, out), "--checkpoint", "latest"]) == 0
    whole = capsys.readouterr().out
    assert main(["test", *options(data, out), "--checkpoint", "latest", "--only", "text,audio"]) == 0
    part = capsys.readouterr().out
    assert whole.startswith("accuracy") and "loss" in part and whole != part
    assert main(["predict", *options(data, out), "--output", str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["key"] for a in answers] == [f"test-{i:03d}" for i in range(10)]
    assert {a["label"] for a in answers} <= {"a", "b", "c"}
    unread = lambda *_: pytest.fail("it predicted first")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfast.train.Trainer.predict", unread)
        told = said(capsys, "predict", *options(data, out), "--output", tmp_path / "no" / "answers.jsonl")
    assert "no/answers.jsonl; wanted a file that can be written" in told
    assert main(["predict", *options(data, out), "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    assert main(["fit", *options(data, out, trainer__max_steps=8), "--resume"]) == 0
    assert sorted(losses(out)) == list(range(1, 9))


def test_a_checkpoint_is_used_only_where_its_weights_mean_the_same(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["fit", *options(data, out, trainer__max_steps=2)]) == 0
    named = altered(data, tmp_path / "named", classes=["x", "y", "z"])
    line = (
        f"cannot use {out}/checkpoints/step-00000002: data classes was ['a', 'b', 'c'], now ['x', 'y', 'z']"
    )
    assert line in said(capsys, "predict", *options(named, out))
    other = altered(data, tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    words = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = dict(zip(words, [0, 1, *sorted(words.values())[:1:-1]], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    assert "data tokenizer was" in said(capsys, "test", *options(other, out))
    line = "data.modalities.audio.sample_rate was 16000, now 8000"
    assert line in said(capsys, "test", *options(data, out, data__modalities__audio__sample_rate=8000))
    assert main(["test", *options(data, out, data__modalities__image__flip=False)]) == 0  # for training only

    job = yaml.safe_load((ROOT / "configs" / "stamps.yaml").read_text())
    encoders = job["model"]["init_args"]["encoders"]
    job["model"]["init_args"]["encoders"] = {name: encoders[name] for name in ("audio", "text", "image")}
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    swapped = ["--config", tmp_path / "swapped.yaml", *options(data, out, trainer__max_steps=4)[2:]]
    line = "model.encoders was ['image', 'text', 'audio'], now ['audio', 'text', 'image']"
    assert line in said(capsys, "test", *swapped) and line in said(capsys, "fit", *swapped, "--resume")

    bare = altered(data, tmp_path / "bare", labels=-1, classes=[])
    assert main(["predict", *options(bare, out), "--output", str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {a["label"] for a in answers} <= {"a", "b", "c"}
    assert "the dataset has 0 classes; wanted 1 or more" in said(capsys, "test", *options(bare, out))


@pytest.mark.parametrize("command", ["fit", "check"])
def test_data_that_cannot_teach_is_refused_before_the_first_step(data, tmp_path, capsys, command):
    run = tmp_path / "run"
    none = altered(data, tmp_path / "none", labels=-1)
    assert "no sample of the train split has a 'label'" in said(capsys, command, *options(none, run))
    bare = altered(data, tmp_path / "bare", labels=-1, classes=[])
    assert "the dataset has 0 classes" in said(capsys, command, *options(bare, run))
    part = altered(data, tmp_path / "part", splits={"train": 37})
    assert "validation" in said(capsys, command, *options(part, run))
    part = altered(data, tmp_path / "untaught", splits={"test": 10})
    for each in (command, "plan"):
        assert "train" in said(capsys, each, *options(part, run))
    line = said(capsys, command, *options(data, run, trainer__best="acuracy"))
    assert "trainer.best is 'acuracy'; validation has accuracy, loss, count" in line
    assert not run.exists()


def test_check_and_plan_say_what_a_job_would_use(data, tmp_path, capsys):
    assert main(["check", *options(data, tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "image        [8, 3, 32, 32] float32, present in" in said and "first step" in said
    assert main(["plan", *options(data, tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "37 samples to train on, 4.6 steps an epoch" in said and "encoders.image" in said
    assert not (tmp_path / "run").exists()


def test_one_modality_alone_is_read_and_built_alone(data, tmp_path, capsys):
    arguments = options(data, tmp_path, trainer__max_steps=2, trainer__only="[image]")
    assert list(load_config(arguments[1], arguments[2:]).selected().data.modalities) == ["image"]
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "encoders.image" in said and "encoders.text" not in said
    assert main(["fit", *arguments]) == 0


def test_the_article_model_trains_by_its_name(data, tmp_path):
    # the class is chosen after the file, so that settings of the other model go with it
    arguments = [a for a in options(data, tmp_path, trainer__max_steps=2) if not a.startswith("--model.")]
    assert main(["fit", *arguments, "--model=ArticleConfig"]) == 0


@pytest.mark.parametrize("name", ["stamps", "digits"])
def test_the_shipped_configurations_are_read(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml", ["--trainer.max_steps=7"])
    assert list(config.data.modalities) == ["image", "text", "audio"] == list(config.model.encoders)
    assert config.trainer.max_steps == 7


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("max_steps:", "max_stepz:", "unknown configuration key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        ("width:", "widht:", "unknown configuration key 'widht' of ImageResNet; did you mean 'width'?"),
        ("dropout:", "dropuot:", "unknown configuration key 'dropuot' of ModelConfig; did you mean 'dropout'?"),
        ("size: 112", "siez: 112", "unknown configuration key 'siez' of Image; did you mean 'size'?"),
        ("max_steps: 300", "max_steps: many", "trainer.max_steps: got many, wanted int"),
        ("width: 64", "width: 3", "ImageResNet.groups: got 32, wanted a divisor of width 3"),
        ("ImageResNet", "ImageResnet", "model: ModelConfig: encoders: there is no class 'ImageResnet'"),
        ("lr: 1.0e-3", "lr: -1", "trainer.lr is -1.0; wanted 0 or more"),
        ("max_steps: 300", "max_steps: null", "trainer.max_steps is null; wanted int"),
        ("out: runs/stamps", "out: null", "trainer.out is null; wanted str"),
        ("out: runs/stamps", "best: null", "trainer.best is null; wanted str"),
        ("path: data/stamps", "path: data/stamps\n  threads: null", "data.threads is null; wanted int"),
        ("{class_path: Concat, init_args: {dim: 256}}", "null", "model.fusion is null; wanted FusionConfig"),
        ("size: 112", "size: null", "data.modalities.image.size is null; wanted int"),
        ("class_path: Image, ", "", "a Modality with 'size' has no class_path; wanted one of Image, Text, Audio"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, old, new, line):
    path = tmp_path / "job.yaml"
    path.write_text((ROOT / "configs" / "stamps.yaml").read_text().replace(old, new, 1))
    assert main(["fit", "--config", str(path)]) == 1
    assert capsys.readouterr().err == f"mmfast: error: {line}\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "wanted keys of data, model and trainer"),
        (b"- 1", "wanted keys of data, model and trainer"),
        (b"a: [1", "Problems parsing config"),
        (b'data: {path: "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
        (b"trainer: null", "trainer is null; wanted TrainerConfig"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(data, tmp_path, capsys, content, line):
    (path := tmp_path / "job.yaml").write_bytes(content)
    told = said(capsys, "fit", *options(data, tmp_path / "run"), "--config", path)
    assert line in told and (str(path) in told or "null" in told)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fitt"], "there is no command 'fitt'"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--config", "configs/stamps.yaml", "--trainer.max_step=3"], "did you mean 'trainer.max_steps'?"),
        (["fit", "--config", "configs/stamps.yaml", "--data.path=nowhere"], "nowhere"),
        (["fit", "--config", "configs/stamps.yaml", "--trainer.only=[smell]"], "trainer.only has 'smell'"),
        (["test", "--config", "configs/stamps.yaml", "--trainer.out=nowhere"], "nowhere"),
        (["fit", "--config", "configs/stamps.yaml", "--resume=nowhere"], "there is no checkpoint nowhere"),
        (["test", "--config", "configs/stamps.yaml", "--split=train"], "unknown configuration key 'split'"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, tmp_path, capsys, data, arguments, line):
    monkeypatch.chdir(ROOT)
    if arguments[0] == "test" or "--resume=nowhere" in arguments:
        arguments = [*arguments, f"--data.path={data}"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("mmfast: error: ") and said.count("\n") == 1 and line in said


def test_an_unexpected_error_shows_where_and_what(monkeypatch, capsys):
    monkeypatch.setattr("mmfast.cli.plan", lambda _: 1 / 0)
    assert main(["plan"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("mmfast: error: ZeroDivisionError: division by zero\n")


def test_help_names_the_options_that_are_not_keys(capsys):
    own = {"fit": ["--resume"], "test": ["--only"], "predict": ["--checkpoint", "--split", "--output"]}
    for command, wanted in own.items():
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and all(option in shown for option in [*wanted, "--trainer.lr"])


def test_help_needs_no_torch():
    code = "import sys, mmfast.cli; mmfast.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and all(name in said.stdout for name in COMMANDS)


def test_a_stopped_process_and_a_new_one_take_the_same_steps(data, tmp_path):
    """Augmentation on, dropout on, prefetch full: as the shipped configuration, in processes of their own."""
    settings = {"trainer__max_steps": 16, "trainer__validate_every": 0}
    assert Command("fit", *options(data, tmp_path / "a", **settings)).wait()[0] == 0
    assert Command("fit", *options(data, tmp_path / "b", trainer__stop_after=8, **settings)).wait()[0] == 0
    assert Command("fit", *options(data, tmp_path / "b", **settings), "--resume").wait()[0] == 0
    assert len(losses(tmp_path / "a")) == 16 and losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_one_line_and_exits_with_its_number(data, tmp_path, signum):
    settings = {"trainer__max_steps": 100000, "trainer__validate_every": 0, "trainer__log_every": 1}
    job = Command("fit", *options(data, tmp_path, **settings))
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and job.process.is_alive(), job.wait(0)
        time.sleep(0.1)
    os.kill(job.process.pid, signum)
    status, _, said = job.wait()
    assert status == 128 + signum
    last = max(losses(tmp_path))
    path = checkpoint.find(tmp_path, "latest")
    assert checkpoint.facts(path)["step"] == last
    assert said == f"mmfast: stopped after step {last}; --resume goes on from {path}\n"


def small_disk(size):
    """The kernel refuses all beyond ``size`` bytes of a file, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kill_at_the_rename():
    """Die by SIGKILL once a checkpoint's files are written, before it has its name."""
    rename = Path.rename

    def kill(self, target):
        if self.name.startswith(".writing"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = kill


def test_a_full_disk_and_a_kill_leave_the_checkpoint_before(data, tmp_path):
    settings = {"trainer__max_steps": 6, "trainer__checkpoint_every": 3, "trainer__validate_every": 0}
    fit = ("fit", *options(data, tmp_path, **settings))
    assert Command(*fit, "--trainer.stop_after=3").wait()[0] == 0
    size = max(path.stat().st_size for path in checkpoint.find(tmp_path, "latest").iterdir())

    status, _, said = Command(*fit, "--resume", before=partial(small_disk, size // 2)).wait()
    assert (
        status == 1
        and said.count("\n") == 1
        and said.startswith("mmfast: error: cannot write the checkpoint")
    )
    assert re.search(r"a file could not be written to its end \(\d+ MiB are free\)", said) and said.endswith(
        "step-00000003 is whole\n"
    )
    assert checkpoint.find(tmp_path, "latest").name == "step-00000003"

    assert Command(*fit, "--resume", before=kill_at_the_rename).wait()[0] == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob(".writing-*"))
    assert checkpoint.find(tmp_path, "latest").name == "step-00000003"

    assert Command(*fit, "--resume").wait()[0] == 0
    assert checkpoint.find(tmp_path, "latest").name == "step-00000006"
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))

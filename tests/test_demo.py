"""The demo, from nothing to the picture, in twenty steps."""

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the demo. While its data is not there, one process at a time: a second one would find it being written."""
    command = [sys.executable, ROOT / "examples/demo.py", "--dataset=digits", *arguments]
    with contextlib.ExitStack() as stack:
        if not (ROOT / "data" / "digits").exists():
            lock = os.open(ROOT, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    done = demo("--steps=20", f"--out={out}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "majority class" in done.stdout
    return out


def test_demo_measures_every_subset_each_modality_alone_and_the_peers(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert set(summary["trained_alone"]) == {"image", "text", "audio"}
    assert len(summary["by_modalities"]) == 7
    assert summary["accuracy"] == summary["by_modalities"]["image+text+audio"]
    accuracies = [
        *summary["by_modalities"].values(),
        *summary["trained_alone"].values(),
        summary["article_accuracy"],
    ]
    assert all(0 < accuracy <= 1 for accuracy in accuracies)
    assert math.isclose(summary["speedup"], summary["samples_per_s"] / summary["stock_samples_per_s"])
    assert summary["stock_samples_per_s"] > 0


def test_demo_draws_a_picture(run: Path) -> None:
    assert (run / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (run / "report.png").stat().st_size > 20_000


SUMMARY = {
    "dataset": "digits",
    "by_modalities": {"image": 0.5, "image+audio": 0.75},
    "trained_alone": {"image": 0.5, "audio": 0.25},
    "article_accuracy": 0.5,
    "majority_accuracy": 0.125,
    "samples_per_s": 200.0,
    "stock_samples_per_s": 100.0,
    "speedup": 2.0,
}


def drawn(attention: dict[str, float]) -> list[Axes]:
    figure = load_demo().draw({**SUMMARY, "attention": attention}, [2.0, 1.0])
    figure.canvas.draw()
    plt.close(figure)
    return figure.axes


def test_the_picture_shows_each_modalitys_share_of_the_attention() -> None:
    *_, axes = drawn({"image": 0.625, "audio": 0.375})
    assert axes.get_ylabel() == "share of the attention"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["image", "audio"]
    assert [bar.get_height() for bar in axes.patches] == [0.625, 0.375]
    assert [text.get_text() for text in axes.texts] == ["62%", "38%"]


def test_without_attention_the_picture_has_its_three_panels() -> None:
    axes = drawn({})
    assert [a.get_ylabel() for a in axes] == ["", "samples / s", "training loss"]
    assert len(axes[0].patches) == 6 and len(axes[1].patches) == 2
    assert list(axes[0].figure.get_size_inches()) == pytest.approx([13, 4.2], abs=0.1)


def test_a_model_that_attends_tells_its_shares(tmp_path: Path) -> None:
    out = tmp_path / "attention"
    options = "--steps=20", f"--out={out}", "--quiet", "--model.fusion=Attention", "--trainer.batch_size=16"
    done = demo(*options)
    assert done.returncode == 0, done.stderr
    shares = json.loads((out / "summary.json").read_text())["attention"]
    assert shares.keys() == {"image", "text", "audio"}
    assert all(share > 0 for share in shares.values()) and math.isclose(sum(shares.values()), 1, rel_tol=1e-3)
    assert (out / "report.png").stat().st_size > 20_000
    boards = [EventAccumulator(str(file)).Reload() for file in out.rglob("events.out.*")]
    tags = [board.Tags()["scalars"] for board in boards]
    assert any({f"validation/share/{name}" for name in shares} <= set(scalars) for scalars in tags), tags


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = demo(f"--out={tmp_path / 'file'}")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr and len(done.stderr.strip().splitlines()) == 1

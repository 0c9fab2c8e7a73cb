"""The demo, from nothing to the picture, in twenty steps."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        ROOT / "examples/demo.py",
        "--dataset=digits",
        "--steps=20",
        f"--out={out}",
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
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


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "examples/demo.py", "--dataset=digits", f"--out={tmp_path / 'file'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr and len(done.stderr.strip().splitlines()) == 1

"""``make gpu``: a step that fails is said, the rest still runs, and the exit status tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
SUITES = (
    "cross_attention",
    "concat_linear",
    "contrastive_loss",
    "weighted_fusion",
    "lowrank_fusion",
    "training_step",
    "cross_attention_scaling",
)

PYTHON = """#!/bin/sh
echo "ran: $* PYTHONPATH=$PYTHONPATH"
case "$*" in
  -) exit $GPU ;;
  *pip*) exit $PIP ;;
  *bench_concat_linear*) exit $BENCH ;;
esac
"""


def run(tmp_path, gpu=0, pip=0, bench=0):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = {
        **os.environ,
        "PYTHON": str(python),
        "GPU": str(gpu),
        "PIP": str(pip),
        "BENCH": str(bench),
        "PYTHONPATH": "",
        "RESULTS": str(tmp_path / "results"),
    }
    return subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, check=False, timeout=60)


def test_all_steps_run_offline_in_that_python(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    calls = [line for line in done.stdout.splitlines() if line.startswith("ran: ")]
    assert "--no-index" in calls[1] and "--no-deps" in calls[1] and "--no-build-isolation" in calls[1]
    assert any("-m pytest -q -m gpu" in call for call in calls)
    suites = [call for call in calls if "--benchmark-only" in call]
    for call, suite in zip(suites, SUITES, strict=True):  # each a process of its own
        assert "--benchmark-only" in call and f"--results={tmp_path / 'results'}" in call
        assert f"mmfast/bench/bench_{suite}.py PYTHONPATH=" in call


@pytest.mark.parametrize("what", ["-m gpu", "bench_concat_linear", "bench_training_step"])
def test_pytest_understands_what_it_is_told(tmp_path, what):
    (call,) = [line for line in run(tmp_path).stdout.splitlines() if what in line and "ran: " in line]
    told = call.removeprefix("ran: ").split(" PYTHONPATH=")[0].replace(" -n 8", "").split()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    found = subprocess.run(
        [sys.executable, *told, "--collect-only"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " tests collected" in found.stdout


def test_without_an_install_it_goes_on_from_the_checkout(tmp_path):
    done = run(tmp_path, pip=1)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: install: exit 1"
    assert f"bench_concat_linear.py PYTHONPATH={ROOT}" in done.stdout


def test_every_failure_is_named(tmp_path):
    done = run(tmp_path, pip=2, bench=3)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert failed == [
        "failed: install: exit 2",
        "failed: bench_concat_linear: exit 3",
    ]


def test_attention_has_tests_that_only_a_gpu_runs(tmp_path):
    (call,) = [line for line in run(tmp_path).stdout.splitlines() if " -m gpu " in line]
    assert "tests/ops/test_cross_attention_gpu.py" in call


@pytest.mark.parametrize("status", [1, 127])
def test_without_a_gpu_nothing_is_touched(tmp_path, status):
    done = run(tmp_path, gpu=status)
    assert done.returncode == 1 and done.stdout.count("ran: ") == 1

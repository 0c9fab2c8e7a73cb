"""``make gpu``: a step that fails is said, the rest still runs, and the exit status tells."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"

PYTHON = """#!/bin/sh
echo "ran: $* PYTHONPATH=$PYTHONPATH"
case "$*" in
  -) exit $GPU ;;
  *pip*) exit $PIP ;;
  *benchmark-only*) exit $BENCH ;;
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
    }
    return subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, check=False, timeout=60)


def test_all_steps_run_offline_in_that_python(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    calls = [line for line in done.stdout.splitlines() if line.startswith("ran: ")]
    assert "--no-index" in calls[1] and "--no-deps" in calls[1] and "--no-build-isolation" in calls[1]
    assert any("-m pytest -q -m gpu" in call for call in calls)
    assert all("--benchmark-only" in call and "--results bench/results" in call for call in calls[-2:])
    assert "bench_cross_attention.py mmfast/bench/bench_cross_attention_scaling.py" in calls[-2]
    assert "mmfast/bench --ignore-glob=*cross_attention*" in calls[-1]


def test_without_an_install_it_goes_on_from_the_checkout(tmp_path):
    done = run(tmp_path, pip=1)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: install: exit 1"
    assert f"--ignore-glob=*cross_attention* PYTHONPATH={SCRIPT.parents[1]}" in done.stdout


def test_every_failure_is_named(tmp_path):
    done = run(tmp_path, pip=2, bench=3)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert failed == [
        "failed: install: exit 2",
        "failed: attention benchmarks: exit 3",
        "failed: other benchmarks: exit 3",
    ]


def test_attention_has_tests_that_only_a_gpu_runs(tmp_path):
    (call,) = [line for line in run(tmp_path).stdout.splitlines() if " -m gpu " in line]
    assert "tests/ops/test_cross_attention_gpu.py" in call


@pytest.mark.parametrize("status", [1, 127])
def test_without_a_gpu_nothing_is_touched(tmp_path, status):
    done = run(tmp_path, gpu=status)
    assert done.returncode == 1 and done.stdout.count("ran: ") == 1

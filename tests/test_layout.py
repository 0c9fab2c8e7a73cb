"""The package is found under its own names, wherever and however it is started."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import mmfast.bench.measure
import mmfast.kernels


def _names(_: int) -> list[str]:
    import mmfast.kernels

    return [mmfast.kernels.__name__, *(name for name in ("kernels", "bench") if name in sys.modules)]


def test_kernels_and_bench_are_seen_inside_the_package_only() -> None:
    assert mmfast.kernels.__name__ == "mmfast.kernels"
    assert mmfast.bench.measure.__name__ == "mmfast.bench.measure"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_names, (0,)) == ["mmfast.kernels"]


def test_the_command_runs_from_any_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, Path(__file__).resolve().parents[1]):
        done = subprocess.run(
            [sys.executable, "-m", "mmfast", "--help"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "prepare" in done.stdout


def test_importing_the_package_is_light() -> None:
    code = "import sys, mmfast, mmfast.cli; print([m for m in ('torch', 'nvidia.dali', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_doctor_names_every_backend_of_every_op() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmfast", "doctor"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for word in ("concat_linear", "triton", "cuda", "reference", "torch", "instruction sets"):
        assert word in done.stdout

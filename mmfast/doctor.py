"""``mmfast doctor``: what is there, what is not, why not, and what that costs."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmfast import __version__, _native
from mmfast.ops import available
from mmfast.ops._backend import choose

_PACKAGES = (
    *("torch", "torchvision", "torchaudio", "triton", "nvidia-dali-cuda130"),
    *("torchcodec", "soundfile", "tokenizers", "tensorboard"),
)
_WITHOUT = {  # what a user loses where a package is missing
    "triton": "no Triton kernels; torch.compile has no GPU code generator",
    "nvidia-dali-cuda130": "images and audio are decoded by torchcodec and soundfile, on the CPU only",
    "torchcodec": "images are decoded by Pillow where DALI does not do it",
    "soundfile": "no audio outside DALI",
    "tokenizers": "no text",
    "tensorboard": "no TensorBoard log; metrics.jsonl holds the same figures",
}
_COST = {  # what a user loses where a backend is not ready
    ("cpu", "cpu"): "plain PyTorch takes its place",
    ("cpu", "triton"): "nothing: on CPU tensors it is for tests",
    ("cuda", "triton"): "without it plain PyTorch takes its place",
    ("cuda", "cuda"): "without it Triton or plain PyTorch takes its place",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpuinfo() -> str:
    """The text of /proc/cpuinfo, empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def processor(text: str) -> str:
    """The processor's name in what ``cpuinfo`` says.

    A virtual machine may keep the number to itself, and then a name stands for several generations: family
    and model tell them apart.
    """
    said = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)", text, re.MULTILINE))
    name = str(said.get("model name", platform.processor() or platform.machine())).strip()
    if re.search(r"\d", name) or "cpu family" not in said:
        return name
    return f"{name} (family {said['cpu family']}, model {said['model']})"


def _instruction_sets() -> str:
    try:
        from mmfast import _host
    except ImportError:
        return "unknown: mmfast._host was not built"
    return " ".join(_host.cpu_features()) or "none beyond the baseline"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        reason = "no device is visible" if torch.version.cuda else "this torch has no CUDA"
        return [f"none: {reason}"]
    return [
        f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _ops() -> list[str]:
    rooms = Path(__file__).with_name("ops").glob("[!_]*.py")
    return sorted(room.stem for room in rooms if room.stem != "reference")


def _native_lines() -> list[str]:
    facts = Path(__file__).with_name("native.txt")
    lines = (
        facts.read_text().strip().splitlines()
        if facts.exists()
        else ["built: nothing (native.txt is not there)"]
    )
    return lines + [
        f"not loaded: lib{name}: {why}" for name, why in _native.missing.items() if why != "not built"
    ]


def main() -> int:
    """Prints the tables; 0 always: what is missing is a fact, not a failure."""
    console = Console()
    machine = Table("machine", "", title=f"mmfast {__version__}", title_justify="left")
    machine.add_row("Python", platform.python_version())
    machine.add_row(
        "CPU", f"{processor(cpuinfo())}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    )
    machine.add_row("instruction sets", _instruction_sets())
    if _native.cpu:
        machine.add_row("CPU kernels", f"run with {_native.isa()}")
    for gpu in _gpus():
        machine.add_row("GPU", gpu)
    for line in _native_lines():
        machine.add_row("native", line)
    console.print(machine)

    packages = Table("package", "version", "what its absence costs")
    for package in _PACKAGES:
        version = _version(package)
        packages.add_row(package, version or "not there", "" if version else _WITHOUT.get(package, ""))
    console.print(packages)

    backends = Table("op", "tensors", "backend", "state", "what that costs")
    for op in _ops():
        for device in ("cpu", "cuda"):
            chosen = (
                choose(op, torch.device(device)) if device == "cpu" or torch.cuda.is_available() else None
            )
            for backend, state in available(op, device).items():
                if backend in ("cpu", "cuda") and backend != device:
                    continue
                ready = state == "ready"
                mark = f"{state}, chosen" if backend == chosen else state
                backends.add_row(op, device, backend, mark, "" if ready else _COST.get((device, backend), ""))
    console.print(backends)
    return 0

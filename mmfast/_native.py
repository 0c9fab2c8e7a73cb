"""Loads the native libraries that are there, and remembers why one is not."""

import ctypes
from pathlib import Path

import torch

missing: dict[str, str] = {}
_loaded: dict[str, ctypes.CDLL] = {}


def _load(name: str, *, wanted: bool = True) -> bool:
    path = Path(__file__).parent / f"lib{name}.so"
    if not path.exists():
        missing[name] = "not built"
    elif not wanted:
        missing[name] = "this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(path))
            _loaded[name] = ctypes.CDLL(str(path))
            return True
        except OSError as error:  # torch's message leaves out the reason; the cause has it
            missing[name] = str(error.__cause__ or error)
    return False


cpu = _load("mmfast_cpu")
cuda = _load("mmfast_cuda", wanted=torch.version.cuda is not None)

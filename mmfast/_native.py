"""Loads the native libraries that are there, and remembers why one is not.

They lie beside this file, or where ``MMFAST_NATIVE`` in the environment says, as in ``make sanitize``.
"""

import ctypes
import os
from pathlib import Path

import torch

missing: dict[str, str] = {}
_loaded: dict[str, ctypes.CDLL] = {}


def _load(name: str, *, wanted: bool = True) -> bool:
    path = Path(os.environ.get("MMFAST_NATIVE") or Path(__file__).parent) / f"lib{name}.so"
    if not path.exists():
        missing[name] = "not built"
    elif not wanted:
        missing[name] = "this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(path))
            _loaded[name] = ctypes.CDLL(str(path))
            _loaded[name].mmfast_calls.restype = ctypes.c_int64
            return True
        except OSError as error:  # torch's message leaves out the reason; the cause has it
            missing[name] = str(error.__cause__ or error)
    return False


cpu = _load("mmfast_cpu")
cuda = _load("mmfast_cuda", wanted=torch.version.cuda is not None)


def calls(name: str) -> int:
    """How often the native kernel ``name``, such as ``"concat_linear.cpu"``, was entered in this process."""
    return sum(library.mmfast_calls(name.encode()) for library in _loaded.values())


def isa(name: str | None = None) -> str:
    """The instruction set that the CPU kernels run with; ``name`` switches to another (tests do).

    ``MMFAST_ISA`` in the environment names the first one. Without it, it is the best of the processor.

    Raises:
        ValueError: this processor, or this build, does not have ``name``.
        RuntimeError: ``libmmfast_cpu`` is not there.
    """
    if not cpu:
        raise RuntimeError(f"libmmfast_cpu: {missing['mmfast_cpu']}")
    switch = _loaded["mmfast_cpu"].mmfast_isa
    switch.restype = ctypes.c_char_p
    chosen: bytes | None = switch(None if name is None else name.encode())
    if chosen is None:
        raise ValueError(f"instruction set {name!r}: this processor or this build does not have it")
    return chosen.decode()

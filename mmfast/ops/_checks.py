"""What the ops say of arguments that do not fit: the argument, what was got, and what was wanted."""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wrong(op: str, name: str, got: object, wanted: str) -> ValueError:
    """The error to raise."""
    got = list(got) if isinstance(got, torch.Size) else got
    return ValueError(f"{op}: {name} is {got}, wanted {wanted}")


def require_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Of the argument whose dtype the others are to have."""
    if dtype not in DTYPES:
        whose = "'" if name.endswith("s") else "'s"
        raise wrong(op, f"{name}{whose} dtype", dtype, "float32, bfloat16, float16 or float64")


def require_tensor(op: str, name: str, given: Any, optional: bool = False) -> None:
    """A tensor, or None where it is ``optional``."""
    if not isinstance(given, Tensor) and not (optional and given is None):
        wanted = "a tensor or None" if optional else "a tensor"
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, wanted {wanted}")


def require_tensors(op: str, name: str, given: Any) -> None:
    """A list or tuple of at least one tensor."""
    if not isinstance(given, list | tuple):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, wanted a list or tuple of tensors")
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}[{i}] is a {type(t).__name__}, wanted a tensor")
    if not given:
        raise wrong(op, name, "empty", "at least one tensor")


def require_flags(
    op: str, name: str, given: Any, device: torch.device, shape: tuple[int, ...], meaning: str
) -> None:
    """Booleans of one shape."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: {name} is a {type(given).__name__}, wanted a tensor")
    if given.dtype != torch.bool or given.device != device:
        raise wrong(op, name, f"{given.dtype} on {given.device}", f"torch.bool on {device}")
    if given.shape != shape:
        raise wrong(op, name, given.shape, f"{list(shape)}{meaning}")

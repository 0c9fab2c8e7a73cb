"""What the layers say of arguments that do not fit, where the op below could not name them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.ops._checks import require_tensors, wrong
from mmfast.ops.cross_attention import INTEGERS


def require_known(layer: nn.Module, argument: str, given: Any, known: Collection[str]) -> None:
    """One of a few words."""
    if given not in known:
        raise wrong(_name(layer), argument, repr(given), "one of " + ", ".join(known))


def require_inputs(
    layer: nn.Module, inputs: Any, widths: Sequence[int], weight: Tensor | None = None
) -> None:
    """A tensor ``[..., width]`` for each of the widths, of the dtype of ``weight`` if that is given."""
    require_tensors(_name(layer), "inputs", inputs)
    if len(inputs) != len(widths):
        raise wrong(_name(layer), "inputs", f"{len(inputs)} tensors", f"{len(widths)}")
    for i, (x, width) in enumerate(zip(inputs, widths, strict=True)):
        if x.dim() == 0 or x.shape[-1] != width:
            raise wrong(_name(layer), f"inputs[{i}]", x.shape, f"[..., {width}]")
        if weight is not None:
            require_dtype(layer, f"inputs[{i}]", x, weight)


def require_dtype(layer: nn.Module, argument: str, given: Tensor, weight: Tensor) -> None:
    """That of the layer's weight, unless autocast casts, or ``fully_shard`` may yet cast the weight."""
    if given.dtype == weight.dtype or type(weight) is not nn.Parameter:
        return
    device = given.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        raise wrong(_name(layer), argument, given.dtype, f"the parameters' {weight.dtype}")


def require_broadcast(layer: nn.Module, inputs: Sequence[Tensor]) -> torch.Size:
    """Leading dimensions that go together: what they are then."""
    lead = inputs[0].shape[:-1]
    for i, x in enumerate(inputs):
        if x.shape[:-1] != lead:
            try:
                lead = torch.broadcast_shapes(lead, x.shape[:-1])
            except RuntimeError:
                before = ", ".join(str(list(t.shape)) for t in inputs[:i])
                wanted = f"leading dimensions that broadcast with those of {before}"
                raise wrong(_name(layer), f"inputs[{i}]", x.shape, wanted) from None
    return lead


def require_streams(layer: nn.Module, sources: Any, known: Iterable[str], **named: Any) -> None:
    """A tensor for each name that is known, and for no other; ``named``: more that some of them may have."""
    for argument, given in ({"sources": sources} | named).items():
        if not isinstance(given, Mapping):
            got = type(given).__name__
            raise TypeError(f"{_name(layer)}: {argument} is a {got}, wanted a tensor for each name")
        require_names(layer, argument, given, known)
    for name, t in sources.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{_name(layer)}: {name} in sources is a {type(t).__name__}, wanted a tensor")
        if t.dim() == 0:
            raise wrong(_name(layer), f"{name} in sources", "a scalar", "[B, S, E]")
    absent = [name for name in known if name not in sources]
    if absent:
        raise ValueError(f"{_name(layer)}: sources has no {', '.join(absent)}, wanted {', '.join(known)}")


def require_names(layer: nn.Module, argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Names of sources."""
    for name in names:
        if name not in known:
            raise ValueError(f"{_name(layer)}: {argument} has {name!r}, wanted one of {', '.join(known)}")


def may_name_a_module(name: str) -> bool:
    """Whether a ``ModuleDict`` takes it for a key."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict(), name)


def require_keys(layer: nn.Module, argument: str, names: Iterable[str]) -> None:
    """Names that a ``ModuleDict`` can have."""
    for name in names:
        if not may_name_a_module(name):
            wanted = "a name without dots that is no attribute of nn.ModuleDict"
            raise wrong(_name(layer), argument, repr(name), wanted)


def require_flags(layer: nn.Module, argument: str, given: Any, *shapes: tuple[int, ...]) -> None:
    """None, or booleans of one of the shapes."""
    if given is None:
        return
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise wrong(_name(layer), argument, described(given), f"bool {wanted}")


def require_lengths(layer: nn.Module, argument: str, given: Any, batch: int) -> None:
    """None, or an integer for each sample."""
    if given is None:
        return
    if not isinstance(given, Tensor) or given.dtype not in INTEGERS or given.shape != (batch,):
        raise wrong(_name(layer), argument, described(given), f"int32 or int64 [{batch}]")


def require(layer: nn.Module, fits: bool, argument: str, got: Any, wanted: str, *numbers: int) -> None:
    """What ``wanted`` says with its ``numbers``: written out only where it is not so, since a size that is
    made a word is no longer dynamic.
    """
    if not fits:
        got = got if isinstance(got, torch.Size | str) else described(got)
        raise wrong(_name(layer), argument, got, wanted.format(*numbers))


def described(given: Any) -> str:
    """A tensor by its dtype and shape, anything else by its type."""
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    return f"{given.dtype} {list(given.shape)}"


def _name(layer: nn.Module) -> str:
    return type(layer).__name__

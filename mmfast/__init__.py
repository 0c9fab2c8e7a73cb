"""mmfast: fused layers, honest benchmarks and FSDP2 training jobs for multimodal models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.compiler._explain import Explanation

__version__ = "0.1.0"


def explain(model: Any, *inputs: Any, **named: Any) -> "Explanation":
    """What ``torch.compile(model, backend="mmfast")`` finds; see ``mmfast.compiler``."""
    from mmfast.compiler._explain import explain  # imports torch, which the command's --help does without

    return explain(model, *inputs, **named)

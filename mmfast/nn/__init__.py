"""Layers made of ``mmfast.ops``."""

from mmfast.nn.concat_linear import ConcatLinear

__all__ = ["ConcatLinear"]

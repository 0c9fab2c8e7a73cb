"""Ops: one public function each, the same on every backend."""

from mmfast.ops import reference
from mmfast.ops._backend import available, backend, native_calls
from mmfast.ops.concat_linear import concat_linear
from mmfast.ops.group_norm import group_norm

__all__ = ["available", "backend", "concat_linear", "group_norm", "native_calls", "reference"]

"""Ops: one public function each, the same on every backend."""

from mmfast.ops import reference
from mmfast.ops._backend import available, backend, native_calls
from mmfast.ops.concat_linear import concat_linear

__all__ = ["available", "backend", "concat_linear", "native_calls", "reference"]

"""Triton kernels, one file an op, imported as ``mmfast.kernels``."""

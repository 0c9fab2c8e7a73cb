"""Benchmarks: one measuring core, one file an op, imported as ``mmfast.bench``."""

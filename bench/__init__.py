"""Benchmarks: one measuring core, a suite per op, a report, and what was measured."""

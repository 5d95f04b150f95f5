"""Benchmarks against what people would use instead: the command `sis-lightning bench`.

Ratios are paired: both sides are timed alternately in one process, so that a machine whose speed drifts slows both.
"""

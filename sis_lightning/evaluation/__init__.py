"""Metrics over whole splits, as the benchmarks define them."""

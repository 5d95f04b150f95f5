"""Metrics over whole splits, as the benchmarks define them. Imports nothing: COCO's and VOC's need no torch."""

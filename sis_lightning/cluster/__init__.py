"""Runs that survive a cluster: safe checkpoints, exact resume, SLURM."""

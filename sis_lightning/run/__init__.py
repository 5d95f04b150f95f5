"""One run: its directory, checkpoints, exact resume, logs and record."""

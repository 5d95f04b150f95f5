"""Checkpoints from which a run resumes to the bit, and the signals that stop it."""

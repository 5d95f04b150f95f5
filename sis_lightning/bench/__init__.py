"""`sis-lightning bench`: what is worth timing, against what people would use instead.

Ratios are paired: the two sides take turns in one process, so that a machine whose speed drifts slows both.
"""

"""Data sets on disk: reading, checking, downloading, and synthetic ones in the same formats."""

"""Benchmarks of pedyra, each a command: `python -m benchmarks.step`. They are no part of the package and its wheel."""

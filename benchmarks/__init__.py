"""Each benchmark of pedyra is a command, as `python -m benchmarks.step`, and no part of the package and its wheel."""

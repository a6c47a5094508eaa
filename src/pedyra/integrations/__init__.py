"""Other people's tools: one file each, which nothing else of the package imports."""

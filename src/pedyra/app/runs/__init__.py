"""A recipe becomes a run folder: set up, planned, trained, judged. The only part that knows recipe, data and method."""

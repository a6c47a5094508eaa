"""A recipe becomes a run folder: it is set up, planned, trained and evaluated."""

"""From a recipe to a run folder and its report: the command line."""

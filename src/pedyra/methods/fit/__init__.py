"""Fit in the run: start at the rank you would have taken, end with the smallest adapter that does the job."""

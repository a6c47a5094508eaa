"""A run folder becomes a report: one offline HTML page, and its figures as files."""

"""Run folder -> report: one offline HTML page, and its figures as files."""

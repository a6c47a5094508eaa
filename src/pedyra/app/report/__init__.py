"""Run folder -> report: one offline HTML page, and its figures as files."""

from pedyra.app.report.images import save_figures as save_figures
from pedyra.app.report.page import build_report as build_report

__all__ = ["build_report", "save_figures"]

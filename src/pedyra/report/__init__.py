"""Run folder -> report: one offline HTML page, and its figures as files."""

from pedyra.report.page import build_report as build_report
from pedyra.report.plot import save_figures as save_figures

__all__ = ["build_report", "save_figures"]

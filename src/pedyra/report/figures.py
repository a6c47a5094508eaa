"""The figures of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Sequence

from pedyra.report import capacity_figures, rank_figures, reason_figures, training_figures
from pedyra.report.chart import Figure
from pedyra.report.run_folder import Run

_BUILDERS = (
    rank_figures.rank_map,
    rank_figures.trajectories,
    rank_figures.moves,
    reason_figures.reasons,
    training_figures.loss_and_metrics,
    capacity_figures.effective_rank,
    capacity_figures.pareto_variance,
    capacity_figures.rank_against_importance,
    training_figures.orthogonality,
    training_figures.gradient_norms,
    training_figures.parameters_and_rank,
)


def make_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure the runs have data for; a plain LoRA run without ranks.jsonl has its loss and metric."""
    return [figure for builder in _BUILDERS if (figure := builder(runs)) is not None]

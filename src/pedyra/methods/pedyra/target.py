"""Fit in the run to a size that is given: nothing is asked, and three cuts lead there."""

from __future__ import annotations

from typing import Any

from pedyra.allocate.contract import Closure, Decision, Run
from pedyra.fitting.curve import Prefixes, num_parameters
from pedyra.fitting.gramians import Calibration
from pedyra.methods.pedyra.run import FitRun

WINDOW = 40
"""Steps that a measuring window takes at most; fewer where adjustments are nearer to each other."""
CUTS = 3


class TargetRun(FitRun):
    """Fit towards `RankConfig.target_rank`."""

    fewest = 1  # adjustment, at which it cuts what the window before it has measured

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.window, self.beginning = min(WINDOW, run.schedule.interval), 0

    @property
    def settled(self) -> bool:
        return self.cuts >= CUTS or super().settled

    def _look(self, step: int, closure: Closure | None) -> None:
        """No loss has to be known."""

    def _begin(self, found: Calibration, left: int) -> Decision:
        """The next of `CUTS` cuts, or of as many as there are adjustments left; each leaves the same part."""
        rank = self.run.config.target_rank
        assert rank is not None
        target = num_parameters(found, dict.fromkeys(self.layers, rank))
        prefixes = Prefixes(found, self.run.config.min_rank)
        parameters = prefixes.parameters[0]
        wanted = parameters * (target / parameters) ** (1 / min(CUTS - self.cuts, left))
        ranks = prefixes.ranks(prefixes.of_parameters(max(target, round(wanted))))
        return self._decision("cut", found, self._cut(found, ranks))

    def _reasons(self, share: float) -> dict[str, Any]:
        return {}

"""Items at scale smoke, each run once for all tests, with the runs that they share; in this process, for speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from rich.console import Console

from pedyra.app.recipe import check_recipe
from pedyra.app.runs.run import train_run
from pedyra.lab.compare.jobs import Job
from pedyra.lab.compare.jobs import Outcome as Ended
from pedyra.lab.paper.item import get_item
from pedyra.lab.paper.run import Outcome, run_item


class InThisProcess:
    """A pool without processes; it has the arguments of LocalPool."""

    def __init__(self, workers: int = 1, start: Any = None) -> None:
        pass

    def run(self, jobs: Sequence[Job], report: Callable[[Ended], None]) -> None:
        for job in jobs:
            job.run.parent.mkdir(parents=True, exist_ok=True)
            try:
                train_run(check_recipe(job.recipe, job.label), overwrite=True, console=Console(quiet=True))
                report(Ended(job, "done"))
            except ValueError as error:
                report(Ended(job, "failed", str(error)))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Id -> what `pedyra paper run ID --scale smoke` came to."""
    out = tmp_path_factory.mktemp("paper")

    @cache
    def run(name: str) -> Outcome:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run's own process has no filters
            patch.setattr("pedyra.lab.compare.compare.LocalPool", InThisProcess)
            return run_item(get_item(name), "smoke", out=out)

    return run

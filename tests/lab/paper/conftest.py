"""Items at scale smoke, each run once for all tests, with the runs that they share; in this process, for speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from rich.console import Console

from pedyra.app.recipe import check_recipe
from pedyra.app.runs.run import train_run
from pedyra.lab.compare.jobs import Job, JobEnd
from pedyra.lab.paper.item import get_item
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_item import MeasuredItem, run_item


def run_in_this_process(jobs: Sequence[Job], report: Callable[[JobEnd], None], engine: object) -> None:
    """As `run_jobs`, without processes."""
    for job in jobs:
        job.run.parent.mkdir(parents=True, exist_ok=True)
        try:
            train_run(check_recipe(job.recipe, job.label), overwrite=True, console=Console(quiet=True))
            report(JobEnd(job, "done"))
        except ValueError as error:
            report(JobEnd(job, "failed", str(error)))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MeasuredItem]:
    """Id -> what `pedyra paper run ID --scale smoke` came to."""
    out = tmp_path_factory.mktemp("paper")

    @cache
    def run(name: str) -> MeasuredItem:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run's own process has no filters
            patch.setattr("pedyra.lab.compare.compare.run_jobs", run_in_this_process)
            return run_item(get_item(name), "smoke", out, Places())

    return run

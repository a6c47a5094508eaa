"""Text of the tables against the records."""

from __future__ import annotations

from pathlib import Path

from pedyra.app.report import facts
from pedyra.app.report.records import read_run


def test_what_a_run_does_not_know_is_left_out(lora_run: Path):
    known = facts.facts(read_run(lora_run))
    assert list(known) == ["Accuracy", "Trainable parameters", "Training time", "Peak memory"]


def test_a_fit_tells_the_size_that_is_left(fitted_run: Path):
    size = facts.facts(read_run(fitted_run))["Smaller adapter"]
    assert size[0] == "500" and "50%" in size[1]

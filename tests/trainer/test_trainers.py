"""Ranks move in every Trainer that people use, a resume is bit for bit, and `pedyra.fit` answers afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import pedyra
from pedyra import adapt

pytest.importorskip("trl")

from trainer_cases import CASES, make_trainer  # noqa: E402
from works_with import note, rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own


@pytest.fixture
def train(quick: Any) -> Any:
    """train(case, out, resume=..., **settings): the Trainer and the handle of `adapt`, after twelve steps."""

    def go(case: str, out: Path, resume: str | None = None, **settings: Any) -> Any:
        trainer = make_trainer(case, out, **settings)
        handle = adapt(trainer, quick()["config"])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, handle

    return go


@pytest.mark.parametrize("case", CASES)
def test_ranks_move_a_resume_is_exact_and_a_fit_answers(case, train, tmp_path, run_state, assert_equal):
    saving: dict[str, Any] = dict(save_strategy="steps", save_steps=4)
    trainer, callback = train(case, tmp_path / "whole", **saving)
    unbroken = run_state(trainer, callback)
    assert [record["step"] for record in callback.allocator.history] == [3, 5, 7]
    assert len(set(callback.result.ranks.values())) > 1
    checkpoint = tmp_path / "again" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", checkpoint)
    assert_equal(run_state(*train(case, tmp_path / "again", str(checkpoint), **saving)), unbroken)

    found = pedyra.fit(trainer, rows=64, tolerance="5%")
    surrogate = case in ("GRPO", "RLOO")  # which says nothing of rows that are held out
    assert found.measure == ("divergence from the whole adapter" if surrogate else "loss")
    found.save(tmp_path / "small")
    note("trainer", case, ranks="move", resume="the same bits", fit=f"by the {found.measure}")
    assert (tmp_path / "small" / "adapter_config.json").is_file()


def test_the_docs_have_a_row_of_every_case():
    assert {row["name"] for row in rows() if row["kind"] == "trainer"} == {*CASES}, "run: make works-with"

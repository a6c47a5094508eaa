"""Ranks move in every Trainer that people use, a resume is bit for bit, and `pedyra.fit` answers afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

import pedyra
from pedyra import adapt

pytest.importorskip("trl")

from trainer_cases import CASES, base, make_trainer  # noqa: E402
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

    found = pedyra.fit(trainer, rows=64, tolerance=0.05)
    surrogate = case in ("GRPO", "RLOO")  # which says nothing of rows that are held out
    assert found.measure == ("divergence from the whole adapter" if surrogate else "loss")
    found.save(tmp_path / "small")
    note("trainer", case, ranks="move", resume="the same bits", fit=f"by the {found.measure}")
    assert (tmp_path / "small" / "adapter_config.json").is_file()


def test_what_was_trained_by_answers_alone_loads_in_peft(train, tmp_path, tokens, logits):
    """The loss falls, and the saved adapter is an ordinary LoRA of several ranks."""
    trainer, _ = train("SFT", tmp_path, completion_only_loss=True, logging_steps=4)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    tokens["input_ids"] %= base().config.vocab_size
    trainer.model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert (logits(stock) - logits(trainer.model)).abs().max() < 1e-5


def test_the_docs_have_a_row_of_every_case():
    assert {row["name"] for row in rows() if row["kind"] == "trainer"} == {*CASES}, "run: make works-with"

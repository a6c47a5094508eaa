"""A run reports while it trains: to Trainer's log, its `report_to`, and the record file."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pedyra import PeDyra, adapt
from pedyra.allocate.allocation import stayed
from pedyra.lora.layer import adapted_layers

LOGGED = {"logging_strategy": "steps", "logging_steps": 2}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture
def run(make_trainer: Any, quick: Any):
    def go(
        out: Path, *, record: Path | None = None, resume_at: int | None = None, config: Any = None, **arguments: Any
    ):
        trainer, callback = make_trainer(
            out, config or quick(), adapting={"record_to": record}, **{**LOGGED, **arguments}
        )
        trainer.train(resume_from_checkpoint=None if resume_at is None else str(out / f"checkpoint-{resume_at}"))
        return trainer, callback

    return go


def test_the_log_of_every_logging_step_has_the_ranks_of_that_step(run, tmp_path):
    trainer, callback = run(tmp_path, record=tmp_path / "ranks.jsonl")
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert list(logs) == [2, 4, 6, 8, 10, 12]
    after = {record["step"]: record for record in callback.allocator.history}
    for step, adjusted in ((4, 3), (6, 5), (8, 7), (12, 7)):
        ranks = after[adjusted]["ranks"]
        assert logs[step]["ranks/total"] == sum(ranks.values())
        assert logs[step]["ranks/parameters"] == after[adjusted]["parameters"]
        query = [rank for name, rank in ranks.items() if name.endswith("query")]
        assert logs[step]["ranks/mean_attention.self.query"] == pytest.approx(sum(query) / len(query))
    assert {
        "ranks/mean_attention.self.value",
        "ranks/mean_output.dense",
        "ranks/skipped_steps",
        "orthogonality",
    } <= logs[12].keys()


def test_scores_are_logged_while_tracked_and_not_after(run, tmp_path):
    trainer, _ = run(tmp_path)
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert logs[6]["scores/min"] <= logs[6]["scores/mean"] <= logs[6]["scores/max"]
    assert "scores/mean" not in logs[12]


@pytest.mark.parametrize("directory", [None, "elsewhere"])
def test_tensorboard_gets_everything_in_the_one_run_that_trainer_writes(run, tmp_path, monkeypatch, directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    if directory is not None:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / directory))
    trainer, _ = run(tmp_path / "out", report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    assert file.is_relative_to(tmp_path / (directory or "out"))
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for log in (entry for entry in trainer.state.log_history if "loss" in entry):
        for key, value in log.items():
            if key not in ("step", "epoch"):
                points = {event.step: event.value for event in events.Scalars(f"train/{key}")}
                assert points[log["step"]] == pytest.approx(value)
    ranks = ("total", "mean_attention.self.query")
    expected = (*(f"ranks/{name}" for name in ranks), "scores/mean", "orthogonality", "loss")
    assert {f"train/{name}" for name in expected} <= set(events.Tags()["scalars"])


def test_evaluation_logs_are_left_alone(run, tmp_path):
    trainer, _ = run(tmp_path, eval_strategy="steps", eval_steps=6)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any(key.startswith("ranks/") for entry in evaluations for key in entry)


def test_the_record_has_the_setup_a_snapshot_a_log_and_every_adjustment(run, tmp_path):
    path = tmp_path / "records" / "ranks.jsonl"
    _, callback = run(tmp_path / "out", record=path)
    rows = records(path)
    assert [(row["kind"], row.get("step")) for row in rows] == [
        ("layers", None),
        ("snapshot", 0),
        ("snapshot", 2),
        ("adjustment", 3),
        ("snapshot", 4),
        ("adjustment", 5),
        ("snapshot", 6),
        ("adjustment", 7),
        ("snapshot", 8),
        ("snapshot", 10),
        ("snapshot", 12),
    ]
    setup, start = rows[:2]
    assert {layer["name"]: layer["rank"] for layer in setup["layers"]} == start["ranks"]
    assert setup["schedule"]["adjustments"] == 3  # after steps 3, 5 and 7
    assert [row for row in rows if row["kind"] == "adjustment"] == callback.allocator.history
    assert rows[-1]["ranks"] == callback.allocator.ranks


def test_a_resume_cuts_the_record_back_to_its_checkpoint(run, tmp_path):
    path = tmp_path / "ranks.jsonl"
    run(tmp_path / "out", record=path, save_strategy="steps", save_steps=5)
    whole = without_seconds(records(path))
    with path.open("a") as file:
        file.write('{"kind": "snapshot", "step": 1')  # a line that a crash cut short
    run(tmp_path / "out", record=path, resume_at=5)
    assert without_seconds(records(path)) == whole


@pytest.mark.parametrize("left", [0, 3])
def test_a_record_that_was_emptied_has_the_adjustments_of_the_checkpoint_again(run, tmp_path, left):
    path = tmp_path / "ranks.jsonl"
    run(tmp_path / "out", record=path, save_strategy="steps", save_steps=5)
    whole = without_seconds(records(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    run(tmp_path / "out", record=path, resume_at=5)
    found = without_seconds(records(path))
    assert found[0] == whole[0]
    assert [row for row in found if row["kind"] == "adjustment"] == [r for r in whole if r["kind"] == "adjustment"]


# What became of the ranks, when training has ended.


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.step


def test_the_result_is_what_the_model_and_the_record_say(run, tmp_path):
    trainer, callback = run(tmp_path, record=tmp_path / "ranks.jsonl")
    result, layers = callback.result, adapted_layers(trainer.model)
    adjustments = [row for row in records(tmp_path / "ranks.jsonl") if row["kind"] == "adjustment"]
    assert (result.steps, result.adjustments, result.planned, result.first) == (12, 3, 3, 3)
    assert result.pruned == sum(len(row["pruned"]) for row in adjustments) > 0
    assert result.added == sum(sum(row["added"].values()) for row in adjustments) > 0
    assert result.ranks_before == {layer.name: 3 for layer in layers}
    assert result.ranks == {layer.name: len(layer.a.A) for layer in layers} != result.ranks_before
    trained = [p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name and p.requires_grad]
    assert result.parameters == sum(trained) <= result.parameters_before
    said = re.findall(r"[\d,]+", str(result))
    assert {str(result.pruned), str(result.added), f"{result.parameters:,}", f"{result.parameters_before:,}"} <= set(
        said
    )


def test_before_a_training_has_ended_there_is_no_result(make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="call trainer.train"):
        _ = callback.result

    class Asking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            with pytest.raises(ValueError, match="call trainer.train"):
                _ = callback.result

    trainer.add_callback(Asking())
    trainer.train()
    assert callback.result.steps == 12


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the progress bar
@pytest.mark.parametrize("silent", [False, True])
def test_one_line_of_it_is_printed_where_trainer_prints_its_progress(silent, run, tmp_path, monkeypatch):
    """On a line of its own: not behind the bar, which a terminal shows on the same lines."""
    terminal = io.StringIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    _, callback = run(tmp_path, disable_tqdm=silent)
    shown = [line for line in terminal.getvalue().splitlines() if "pedyra: " in line]
    assert shown[1:] == ([] if silent else [f"pedyra: {callback.result}"])
    assert (len(shown) == 2) != silent  # the first says how much there is to learn from


def test_a_training_that_stops_before_its_first_adjustment_says_so(make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path)  # the first follows step 3
    trainer.add_callback(StopAfter(2))
    trainer.train()
    assert (callback.result.adjustments, callback.result.pruned, callback.result.added) == (0, 0, 0)
    assert callback.result.ranks == callback.result.ranks_before
    assert re.search("no rank moved: .*after 2 steps.*step 3; train longer", str(callback.result))


def test_added_triples_that_are_pruned_later_have_not_stayed():
    """A layer of 3 gets two triples, indices 3 and 4. The next adjustment prunes 1 and 4, of which 4 is one of those,
    and adds none: the other one is 2 now, which the third prunes, as it adds another that the last leaves alone."""

    def adjustment(pruned: list[int], added: int, rank: int) -> dict[str, Any]:
        return {"pruned": [["a", index, 0.0] for index in pruned], "added": {"a": added}, "ranks": {"a": rank}}

    history = [adjustment([], 2, 5), adjustment([1, 4], 0, 3), adjustment([2], 1, 3), adjustment([0], 0, 2)]
    assert [stayed(history[:count]) for count in range(5)] == [0, 2, 1, 1, 1]


def test_adjustments_that_move_nothing_are_told_as_such(run, tmp_path):
    _, callback = run(tmp_path)
    still = replace(callback.result, pruned=0, added=0, stayed=0, ranks=callback.result.ranks_before)
    assert f"no rank moved in {still.adjustments} adjustments" in str(still)
    assert "no rank moved" not in str(replace(still, pruned=1, added=1))  # it came back to where it had been


@pytest.mark.parametrize(("kept", "advised"), [(10, False), (5, False), (4, True)])
def test_a_run_in_which_less_than_half_of_what_was_added_stayed_is_told_so(run, tmp_path, kept, advised):
    _, callback = run(tmp_path)
    line = str(replace(callback.result, pruned=10, added=10, stayed=kept))
    assert ("lower moves" in line, f"({kept} of them stayed)" in line) == (advised, True)


@pytest.mark.parametrize("number", [4, 400])
def test_before_the_first_step_parameters_stand_beside_the_labels_to_learn_from(make_trainer, tmp_path, caplog, number):
    """12 steps of 8 rows with a label each; of a data set of fewer rows each counts once."""
    trainer, callback = make_trainer(tmp_path)
    trainer.train_dataset = [trainer.train_dataset[index % len(trainer.train_dataset)] for index in range(number)]
    with caplog.at_level(logging.INFO, logger="pedyra"):
        trainer.train()
    (line,) = re.findall(r"the adapter has .*", caplog.text)
    batch = trainer.args.per_device_train_batch_size
    parameters = callback.result.parameters_before
    labels = min(number, 12 * batch)
    assert f"{parameters:,} parameters, to learn from about {labels} labels" in line
    assert ("hardly matters where the ranks are" in line) == (parameters > 30 * labels)


def test_answer_tokens_are_counted_without_those_that_no_loss_counts(make_llama, quick, tmp_path, caplog):
    labels = [-100, -100, 5, 6, 7, -100]
    rows = [{"input_ids": [3, 4, 5, 6, 7, 8], "labels": labels} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, gradient_accumulation_steps=2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    trainer = Trainer(make_llama(), arguments, train_dataset=rows)  # type: ignore[arg-type]
    adapt(trainer, quick(final_warmup=1)["config"])
    with caplog.at_level(logging.INFO, logger="pedyra"):
        trainer.train()
    assert "about 48 labels or answer tokens" in caplog.text  # 16 rows of 3


@pytest.mark.parametrize(("weight", "warned"), [(1e-9, False), (1e3, True)])
def test_an_eq2_that_outweighs_the_task_is_told_once_with_its_ratio(run, tmp_path, caplog, weight, warned):
    method = PeDyra.as_published(orth_weight=weight, interval=3, initial_warmup=0, final_warmup=3, moves=2)
    with caplog.at_level(logging.WARNING, logger="pedyra"):
        trainer, _ = run(tmp_path, config=method, logging_strategy="steps", logging_steps=5)
    ratios = [log["orthogonality_ratio"] for log in trainer.state.log_history if "orthogonality_ratio" in log]
    assert len(ratios) == 2 and all((ratio > 1) == warned for ratio in ratios)
    assert caplog.text.count("set orth_weight=0") == warned

"""train_run: a recipe becomes a run folder, and nothing that is there is lost."""

import errno
import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from pedyra.files import read_rows
from pedyra.lora.inspection import inspect_adapter
from pedyra.recipe import Recipe, load_recipe
from pedyra.report.run_folder import read_run
from pedyra.runs.evaluate import evaluate_run
from pedyra.runs.metrics_log import MetricsLog
from pedyra.runs.run import plan_run, train_run
from pedyra.runs.run_folder import RunFolder

RECIPE = {
    "name": "toy",
    "method": "lora",
    "model": {"name": "tiny-bert"},
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 16},
    "lora": {"r": 4, "alpha": 8},
    "training": {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "use_cpu": True,
    },
}
RANK = {
    **{"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3},
    **{"init": "orthogonal", "expand": "importance", "min_rank": 1},  # triples move whether or not it helps
}


@pytest.fixture
def recipe(tmp_path):
    """recipe(method=..., **sections): the small recipe above with changes, writing to tmp_path/run."""

    def make(method="lora", output="run", **changes):
        content = {**RECIPE, "method": method, "output_dir": str(tmp_path / output)}
        if method != "lora":
            content["rank"] = RANK
        for section, values in changes.items():
            content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
        return Recipe.model_validate(content)

    return make


def run(recipe, **flags) -> Any:
    return train_run(recipe, console=Console(file=StringIO()), **flags)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def steps_of(folder, kind):
    """The adjustments or evaluations that a folder tells, without their times."""
    if kind == "adjustment":
        rows = [row for row in read_rows(folder / "ranks.jsonl") if row["kind"] == kind]
    else:
        rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval_loss" in row and "final" not in row]
    return [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(step): Ctrl-C while that step is taken, once."""

    def arm(step):
        original = MetricsLog.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                monkeypatch.setattr(MetricsLog, "on_step_end", original)
                signal.raise_signal(signal.SIGINT)
            return original(self, args, state, control, **kwargs)

        monkeypatch.setattr(MetricsLog, "on_step_end", on_step_end)

    return arm


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_finished_run_holds_all_files_and_ends_with_the_final_line(recipe, method):
    result = run(recipe(method))
    folder = result.folder.path
    expected = {"recipe.yaml", "metrics.jsonl", "environment.json", "adapter"}
    assert expected <= {path.name for path in folder.iterdir()}
    assert load_recipe(folder / "recipe.yaml") == recipe(method)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    final = rows[-1]
    assert (final["step"], final["final"], final["metric"]) == (12, True, "accuracy")
    assert final["value"] == [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1]
    assert final == result.final
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["seed"], environment["device"]) == (0, "cpu")
    assert environment["versions"]["torch"] == torch.__version__


def test_trainable_parameters_are_counted_by_hand(recipe):
    # tiny-bert: 2 blocks of four 64 x 64 linears, 64 x 128 and 128 x 64; a 64 x 64 pooler; a head of 2 x 64 + 2.
    final = run(recipe()).final
    assert final["trainable_parameters"] == 4 * (2 * (4 * 128 + 192 + 192) + 128) + 130


def test_the_saved_adapter_gives_the_metrics_of_the_final_line(recipe):
    result = run(recipe("pedyra"))
    metrics = evaluate_run(result.folder.path)
    assert metrics["accuracy"] == result.final["value"]
    assert metrics["loss"] == pytest.approx(result.final["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_interrupted_and_resumed_equals_unbroken_bit_for_bit(recipe, interrupt_at, method):
    whole = run(recipe(method, output="whole"))
    interrupt_at(7)
    stopped = run(recipe(method))
    assert (stopped.interrupted, stopped.step) == (True, 7)
    assert not (stopped.folder.path / "adapter").exists()
    resumed = run(recipe(method), resume=True)
    assert_same_tensors(adapter(resumed.folder.path), adapter(whole.folder.path))
    assert steps_of(resumed.folder.path, "eval") == steps_of(whole.folder.path, "eval")
    assert resumed.layers == whole.layers
    if method == "pedyra":
        adjustments = steps_of(resumed.folder.path, "adjustment")
        assert adjustments == steps_of(whole.folder.path, "adjustment") and len(adjustments) == 3
    environment = json.loads((resumed.folder.path / "environment.json").read_text())
    assert environment["resumed_from"] == 7


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_run_killed_after_its_last_checkpoint_can_still_be_finished(recipe, method):
    whole = run(recipe(method)).folder
    before = adapter(whole.path)
    rows = read_rows(whole.metrics)
    whole.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    finished = run(recipe(method), resume=True)
    assert (finished.step, finished.final["value"]) == (12, rows[-1]["value"])
    assert_same_tensors(adapter(whole.path), before)


def test_resume_needs_the_same_recipe(recipe, interrupt_at):
    interrupt_at(5)
    run(recipe())
    with pytest.raises(ValueError, match="training.learning_rate was 0.01 and is now 0.02"):
        run(recipe(training={"learning_rate": 0.02}), resume=True)


def test_a_mistake_in_the_new_recipe_leaves_the_old_run_alone(recipe):
    folder = run(recipe()).folder.path
    before = adapter(folder)
    with pytest.raises(ValueError, match="matches no module"):
        run(recipe(lora={"target_modules": ["quary"]}), overwrite=True)
    assert_same_tensors(adapter(folder), before)
    assert run(recipe(seed=1), overwrite=True).final is not None
    assert load_recipe(folder / "recipe.yaml").seed == 1


def test_a_second_run_is_refused(recipe):
    run(recipe())
    with pytest.raises(ValueError, match="holds another run"):
        run(recipe())


def test_methods_share_head_adapter_and_data_of_a_seed(recipe):
    # Before the first step a LoRA start is the same function: so is its first loss on the same batch.
    every = {"training": {"logging_steps": 1, "max_steps": 12}}
    losses = {}
    for method in ("lora", "pedyra"):
        rows = read_rows(run(recipe(method, output=method, **every)).folder.metrics)
        losses[method] = rows[0]["loss"]
    assert losses["lora"] == losses["pedyra"]


def test_a_run_that_is_replaced_comes_back_if_the_new_one_takes_no_step(recipe, monkeypatch):
    folder = run(recipe()).folder.path
    before = adapter(folder)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "notes.txt").write_text("mine")

    def fail(*args, **kwargs):
        raise RuntimeError("no step")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=1), overwrite=True)
    assert_same_tensors(adapter(folder), before)
    assert (folder / "metrics.jsonl").read_text() == metrics and (folder / "checkpoint-12").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        patched.setattr(RunFolder, "bring_back", lambda self: False)  # as if killed then: nothing is put back
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=1), overwrite=True)
        assert not (folder / "adapter").exists()
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=2), overwrite=True)
    assert_same_tensors(adapter(folder), before)  # not lost for the one that was killed
    run(recipe(seed=1), overwrite=True)
    assert not (folder / ".replaced").exists() and (folder / "notes.txt").read_text() == "mine"
    assert load_recipe(folder / "recipe.yaml").seed == 1


def test_a_run_whose_loss_is_no_number_says_so(recipe):
    result = run(recipe(training={"learning_rate": 1e30, "warmup_steps": 0}))
    assert result.diverged and not run(recipe(output="fine")).diverged
    logged = [row["loss"] for row in read_rows(result.folder.metrics) if "loss" in row]
    assert logged[-1] is None  # as JSON has NaN, not the 0 that Trainer would show


def test_a_full_disk_keeps_checkpoints_that_were_never_meant_to_be_resumed(recipe, monkeypatch):
    save_pretrained = PeftModel.save_pretrained

    def fail(self, folder, **kwargs):
        if "checkpoint" not in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_pretrained(self, folder, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="checkpoint-12 holds the adapter, but not what a resume needs"):
        run(recipe(training={"save_only_model": True}))
    kept = Path(recipe().output_dir)
    assert {path.name for path in kept.glob("checkpoint-*")} == {
        "checkpoint-8",
        "checkpoint-12",
    }


def test_a_full_disk_before_the_first_step_keeps_the_run_that_was_there(recipe, monkeypatch):
    folder = run(recipe()).folder.path

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.Trainer.training_step", fail)
    with pytest.raises(OSError, match="before the first step; the run that was there is kept$"):
        run(recipe(seed=1), overwrite=True)
    assert (folder / "adapter").is_dir() and load_recipe(folder / "recipe.yaml").seed == 0


def test_two_processes_do_not_train_into_one_folder(recipe):
    with RunFolder(Path(recipe().output_dir)).held():
        with pytest.raises(ValueError, match="another process trains into .* now; wait for it, or choose another"):
            run(recipe())
    assert run(recipe()).step == 12  # what is left of a lock is no foreign file
    assert not (Path(recipe().output_dir) / ".lock").exists()


def test_where_nothing_can_be_locked_a_run_goes_on(recipe, monkeypatch, caplog):
    def acquire(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert run(recipe()).step == 12
    assert "cannot be locked" in caplog.text


def fill_disk(monkeypatch, *, after):
    """torch.save writes half of an optimizer state and fails, once `after` were written."""
    original, written = torch.save, []

    def save(value, path, *args, **kwargs):
        original(value, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            written.append(path)
            if len(written) > after:
                with open(path, "r+b") as file:
                    file.truncate(100)
                monkeypatch.setattr(torch, "save", original)
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:672] . unexpected pos 17348 vs 17232"
                )  # as seen

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(recipe, monkeypatch, method):
    whole = run(recipe(method, output="whole"))
    fill_disk(monkeypatch, after=1)
    with pytest.raises(OSError, match="disk full.*checkpoint-4 is whole.*--resume") as error:
        run(recipe(method))
    assert error.value.errno == errno.ENOSPC
    resumed = run(recipe(method), resume=True)
    assert_same_tensors(adapter(resumed.folder.path), adapter(whole.folder.path))


def test_a_checkpoint_cut_short_is_passed_over(recipe, interrupt_at):
    interrupt_at(7)
    folder = run(recipe()).folder.path
    state = folder / "checkpoint-7" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    screen = Console(record=True, width=500)
    assert train_run(recipe(), resume=True, console=screen).step == 12
    assert "checkpoint-7, which is not whole: trainer_state.json is cut short or damaged" in screen.export_text()
    assert json.loads((folder / "environment.json").read_text())["resumed_from"] == 4


def test_the_best_checkpoint_is_judged_by_the_metric_of_the_task(recipe):
    best = {"load_best_model_at_end": True, "save_steps": 6}
    result = run(recipe("pedyra", training=best))
    metrics = evaluate_run(result.folder.path)
    values = [row["eval_accuracy"] for row in steps_of(result.folder.path, "eval")]
    assert metrics["accuracy"] == result.final["value"] == max(values)


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_plan_trains_nothing_and_leaves_nothing(recipe, tmp_path, method):
    plan = plan_run(recipe(method))
    assert list(tmp_path.iterdir()) == []
    assert (plan.total_steps, len(plan.layers), plan.rows()[0]["total_rank"]) == (12, 13, 52)
    assert plan.rows()[0]["adjustments"] == (0 if method == "lora" else 3)


def test_rows_that_have_changed_are_not_resumed_on(recipe, interrupt_at, tmp_path):
    rows = [{"text": f"good {number}" if number % 2 else f"bad {number}", "label": number % 2} for number in range(40)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": {"source": str(data), "train_rows": None, "eval_rows": None}}
    interrupt_at(7)
    run(recipe(**changes))
    kept = data.read_text()
    data.write_text(kept.replace("good 1", "fine 1"))
    with pytest.raises(ValueError, match="--resume: the rows of .*d.jsonl, or their tokens, are not those"):
        run(recipe(**changes), resume=True)
    data.write_text(kept)
    assert run(recipe(**changes), resume=True).step == 12


@pytest.mark.parametrize(
    ("batch", "side"), [("per_device_train_batch_size", "training"), ("per_device_eval_batch_size", "held-out")]
)
def test_rows_that_fill_no_batch_are_told_before_the_run(recipe, batch, side):
    training = {"dataloader_drop_last": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    with pytest.raises(ValueError, match=f"leaves no {side} batch: .* fewer than 999; lower training.{batch}"):
        plan_run(recipe(training={**training, batch: 999}))


def test_a_damaged_line_of_metrics_is_told_by_its_number(recipe, interrupt_at):
    interrupt_at(7)
    folder = run(recipe()).folder
    folder.metrics.write_text("damaged\n" + folder.metrics.read_text())
    with pytest.raises(ValueError, match="line 1 of .*metrics.jsonl is damaged"):
        run(recipe(), resume=True)


def test_a_run_is_not_lost_to_one_whose_recipe_cannot_be_written(recipe, monkeypatch):
    folder = run(recipe()).folder
    before = adapter(folder.path)

    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pedyra.runs.run.write_file", fail)
        with pytest.raises(OSError, match="disk full"):
            run(recipe(seed=1), overwrite=True)
    assert_same_tensors(adapter(folder.path), before)
    assert load_recipe(folder.recipe).seed == 0 and folder.is_finished()


def test_a_run_that_was_half_put_aside_by_a_kill_is_whole_again(recipe, monkeypatch):
    folder = run(recipe()).folder
    before = adapter(folder.path)
    rename = Path.rename

    def killed(self, target):
        if self.name == "checkpoint-12":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.set_aside()
    assert folder.holds_run() and not (folder.path / "adapter").exists()
    with pytest.raises(ValueError, match="the run in .* is finished"):
        run(recipe(), resume=True)
    assert_same_tensors(adapter(folder.path), before)
    assert (folder.path / "checkpoint-12").is_dir() and not (folder.path / ".replaced").exists()


def test_eval_refuses_rows_of_which_others_are_held_out_now(recipe, tmp_path):
    rows = [{"text": f"good {number}" if number % 2 else f"bad {number}", "label": number % 2} for number in range(40)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(recipe(data={"source": str(data), "train_rows": None, "eval_rows": None})).folder
    evaluate_run(folder.path)
    data.write_text(data.read_text() + json.dumps({"text": "good 40", "label": 1}) + "\n")
    with pytest.raises(ValueError, match="the training rows of .*d.jsonl, or their tokens, are not those of"):
        evaluate_run(folder.path)


def test_eval_refuses_labels_that_have_other_numbers_now(recipe, tmp_path):
    rows = [{"text": f"{'good' if number % 2 else 'bad'} {number}", "label": "gb"[number % 2]} for number in range(40)]
    data, other = tmp_path / "d.jsonl", tmp_path / "v.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    section = {"source": str(data), "validation": str(other), "train_rows": None, "eval_rows": None}
    folder = run(recipe(data=section)).folder.path
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[8:20]))
    evaluate_run(folder)  # other rows to judge by are the user's choice
    for file in (data, other):
        file.write_text(file.read_text().replace('"b"', '"z"'))
    with pytest.raises(ValueError, match="labels may have other numbers"):
        evaluate_run(folder)


@pytest.mark.parametrize(("strategy", "step"), [("steps", 6), ("epoch", 4), ("epoch", 6), ("epoch", 10)])
def test_an_interrupt_at_an_evaluation_changes_nothing_either(recipe, interrupt_at, strategy, step):
    every = {"max_steps": 10, "eval_strategy": strategy, "save_strategy": strategy}
    changes = {
        "training": {**every, "save_steps": 6, "load_best_model_at_end": True},
        "data": {"train_rows": 16},  # epochs of 4 steps
    }
    whole = run(recipe(output="whole", **changes)).folder.path
    interrupt_at(step)
    stopped = run(recipe(**changes))
    folder = stopped.folder.path
    assert stopped.step == step
    if step < 10:
        folder = run(recipe(**changes), resume=True).folder.path
    assert steps_of(folder, "eval") == steps_of(whole, "eval")
    assert_same_tensors(adapter(folder), adapter(whole))
    assert read_rows(folder / "metrics.jsonl")[-1]["best_step"] == read_rows(whole / "metrics.jsonl")[-1]["best_step"]


def test_the_report_tells_the_ranks_and_losses_of_a_best_adapter_and_of_the_last_step(recipe):
    best = {"load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2, "learning_rate": 0.5}
    folder = run(recipe("random", training=best)).folder.path
    final, read = read_rows(folder / "metrics.jsonl")[-1], read_run(folder)
    assert final["best_step"] < 12 and len(steps_of(folder, "eval")) == 6
    layers = inspect_adapter(folder).layers
    assert {layer.layer: layer.rank for layer in layers} == read.final_ranks
    assert read.final_ranks != read.adjustments[-1]["ranks"]

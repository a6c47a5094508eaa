"""A run that was interrupted or killed goes on bit for bit, and only as what it was."""

import json
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from short_runs import adapter, assert_same_tensors, run, steps_of

from pedyra.app.runs.callbacks import MetricsLog
from pedyra.app.runs.evaluate import finished_run
from pedyra.app.runs.run import train_run
from pedyra.lora.files import json_line, read_rows, read_sums, write_sums


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
    drop_final_row(whole.path)
    finished = run(recipe(method), resume=True)
    assert (finished.step, finished.final["value"]) == (12, rows[-1]["value"])
    assert_same_tensors(adapter(whole.path), before)


def test_resume_needs_the_same_recipe(recipe, interrupt_at):
    interrupt_at(5)
    run(recipe())
    with pytest.raises(ValueError, match="training.learning_rate was 0.01 and is now 0.02"):
        run(recipe(training={"learning_rate": 0.02}), resume=True)


def test_a_folder_that_was_moved_goes_on_where_it_was_stopped(recipe, interrupt_at, tmp_path):
    """What it is asked at its end may be another."""
    interrupt_at(7)
    stopped = run(recipe()).folder.path
    stopped.rename(tmp_path / "some where")
    with pytest.raises(ValueError, match="is not finished; continue with pedyra train") as told:
        finished_run(tmp_path / "some where")
    (tmp_path / "some where").rename(tmp_path / "elsewhere")
    words = shlex.split(str(told.value).partition("pedyra train ")[2])  # as a shell reads what is pasted
    there = str(tmp_path / "some where")
    assert words == [f"{there}/recipe.yaml", f"output_dir={there}", "--resume"]
    went_on = run(recipe(output_dir=str(tmp_path / "elsewhere")), resume=True)
    assert went_on.step == 12
    assert json.loads((tmp_path / "elsewhere" / "environment.json").read_text())["resumed_from"] == 7


def test_the_time_before_a_stop_between_two_logs_counts(tmp_path):
    """Trainer's summary alone has it, and is not kept."""
    before = [{"step": 5, "seconds": 3.0, "loss": 1.0}, {"step": 7, "seconds": 9.0, "train_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, [*before, {"step": 8, "seconds": 20.0}])))
    assert MetricsLog(tmp_path / "metrics.jsonl", resumed_step=7).seconds == 9.0
    assert read_rows(tmp_path / "metrics.jsonl") == before[:1]


def test_a_checkpoint_with_one_flipped_bit_is_passed_over(recipe, interrupt_at):
    interrupt_at(7)
    folder = run(recipe()).folder.path
    weights = folder / "checkpoint-7" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    screen = Console(record=True, width=500)
    assert train_run(recipe(), resume=True, console=screen).step == 12
    assert (
        "checkpoint-7, which is not whole: adapter_model.safetensors does not match SHA256SUMS" in screen.export_text()
    )
    assert json.loads((folder / "environment.json").read_text())["resumed_from"] == 4


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_an_optimizer_that_is_code_is_not_run_and_told_in_one_line(recipe, interrupt_at, capsys):
    interrupt_at(7)
    folder = run(recipe()).folder.path / "checkpoint-7"
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    write_sums(folder, read_sums(folder))
    with pytest.raises(ValueError, match="checkpoint-7 holds more than tensors .*remove that checkpoint") as told:
        run(recipe(), resume=True)
    assert "\n" not in str(told.value) and "this ran" not in capsys.readouterr().out


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


@pytest.mark.parametrize("evaluated", ["no", "steps", "epoch"])
@pytest.mark.parametrize("step", [3, 4, 6, 8])
def test_a_run_killed_after_any_step_goes_on_bit_for_bit(recipe, evaluated, step):
    """Killed after a checkpoint inside an epoch of four steps, or at its end, where the epoch is evaluated too."""
    times = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 10}
    changes = {
        "training": {**times, "eval_strategy": evaluated, "eval_steps": 4},
        "data": {"train_rows": 16},
        "lora": {"dropout": 0.2},
    }
    whole = run(recipe("pedyra", output="whole", **changes)).folder.path
    killed = whole.with_name("killed")
    shutil.copytree(whole, killed, ignore=lambda folder, names: [name for name in names if later(name, step)])
    drop_final_row(killed)
    run(recipe("pedyra", output="killed", **changes), resume=True)
    assert json.loads((killed / "environment.json").read_text())["resumed_from"] == step
    assert_same_tensors(adapter(killed), adapter(whole))
    assert steps_of(killed, "eval") == steps_of(whole, "eval")


def drop_final_row(folder: Path) -> None:
    """Leave the run as a kill before its end does."""
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in read_rows(metrics) if "final" not in row))


def later(name: str, step: int) -> bool:
    """Tell whether a file of a run folder is there only after this step."""
    return name == "adapter" or (name.startswith("checkpoint-") and int(name.removeprefix("checkpoint-")) > step)


def test_the_checkpoint_of_an_interrupt_is_there_whatever_else_is_kept(recipe, interrupt_at):
    """One of the first steps is the best, for the rate is far too high, and Trainer would keep that alone."""
    times = {"max_steps": 12, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    changes = {"training": {**times, "learning_rate": 3.0, "load_best_model_at_end": True, "save_total_limit": 1}}
    interrupt_at(8)
    stopped = run(recipe(**changes))
    assert (stopped.interrupted, stopped.step) == (True, 8)
    assert (stopped.folder.path / "checkpoint-8").is_dir()
    run(recipe(**changes), resume=True)
    assert json.loads((stopped.folder.path / "environment.json").read_text())["resumed_from"] == 8


def test_a_run_goes_on_without_its_fit(recipe, interrupt_at):
    """A fit takes one process, where a resume may have more."""
    interrupt_at(5)
    data = {"eval_rows": 24}
    stopped = run(recipe(fit={"rows": 32}, data=data))
    assert stopped.step == 5
    resumed = run(recipe(data=data), resume=True)
    assert resumed.step == 12 and not (resumed.folder.path / "fit").exists()


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

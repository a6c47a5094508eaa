"""train_run: a recipe becomes a run folder."""

import json
from io import StringIO

import pytest
import torch
import yaml
from rich.console import Console
from short_runs import named, run, steps_of

from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.report.records import read_run
from pedyra.app.runs.evaluate import evaluate_run
from pedyra.app.tasks.toy import toy
from pedyra.lora.files import read_rows
from pedyra.lora.inspection import inspect_adapter


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


def test_the_adapter_comes_with_a_card_that_says_what_was_done(recipe):
    result = run(recipe("pedyra"))
    _, metadata, text = (result.folder.adapter / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert card["tags"] == ["pedyra", "lora"] and card["library_name"] == "peft" and card["metrics"] == ["accuracy"]
    assert "base_model" not in card  # it is of no repository
    parameters = inspect_adapter(result.folder.path)[-1]["parameters"]
    for told in ("pedyra", "tiny-bert", "52 in total", f"{parameters:,}", f"{result.final['value']:.4f}"):
        assert told in text
    assert "site-packages" not in text and "[More Information Needed]" not in text


def test_the_card_tells_the_ranks_on_disk(recipe):
    result = run(recipe("pissa"))
    assert {row["rank"] for row in inspect_adapter(result.folder.path)[:-1]} == {8}  # twice lora.r
    assert "rank 8," in (result.folder.adapter / "README.md").read_text()


def test_a_dropped_last_batch_drops_no_held_out_row(recipe):
    training = {"dataloader_drop_last": True, "per_device_eval_batch_size": 12}  # of 16 rows
    result = run(recipe(training=training))
    metrics = evaluate_run(result.folder.path)
    assert metrics["loss"] == pytest.approx(result.final["eval_loss"], abs=1e-5)
    everything = run(recipe(output="all", training={"per_device_eval_batch_size": 12}))
    assert result.final["eval_loss"] == pytest.approx(everything.final["eval_loss"], abs=1e-5)  # 64 rows, 4 a batch


def test_an_evaluation_of_other_held_out_rows_says_so(recipe, tmp_path):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held")}
    rows = toy()
    files["train"].write_text("".join(json.dumps(row) + "\n" for row in rows[:64]))
    section = {"source": str(files["train"]), "validation": str(files["held"]), "train_rows": None, "eval_rows": None}
    said = []
    for count in (16, 16, 24):
        files["held"].write_text("".join(json.dumps(row) + "\n" for row in rows[-count:]))
        if not said:
            folder = run(recipe(data=section)).folder.path
        evaluate_run(folder, console=Console(file=(screen := StringIO())))
        said.append("the held-out rows are not those" in screen.getvalue())
    assert said == [False, False, True]


def test_trainable_parameters_are_counted_by_hand(recipe):
    # tiny-bert: 2 blocks of four 64 x 64 linears, 64 x 128 and 128 x 64; a 64 x 64 pooler; a head of 2 x 64 + 2.
    final = run(recipe()).final
    assert final["trainable_parameters"] == 4 * (2 * (4 * 128 + 192 + 192) + 128) + 130


def test_the_saved_adapter_gives_the_metrics_of_the_final_line(recipe):
    result = run(recipe("pedyra"))
    metrics = evaluate_run(result.folder.path)
    assert metrics["accuracy"] == result.final["value"]
    assert metrics["loss"] == pytest.approx(result.final["eval_loss"], abs=1e-5)


def test_a_run_whose_loss_is_no_number_says_so(recipe):
    result = run(recipe(training={"learning_rate": 1e30, "warmup_steps": 0}))
    assert result.diverged and not run(recipe(output="fine")).diverged
    logged = [row["loss"] for row in read_rows(result.folder.metrics) if "loss" in row]
    assert logged[-1] is None  # as JSON has NaN, not the 0 that Trainer would show


def test_the_best_checkpoint_is_judged_by_the_metric_of_the_task(recipe):
    best = {"load_best_model_at_end": True, "save_steps": 6}
    result = run(recipe("pedyra", training=best))
    metrics = evaluate_run(result.folder.path)
    values = [row["eval_accuracy"] for row in steps_of(result.folder.path, "eval")]
    assert metrics["accuracy"] == result.final["value"] == max(values)


def test_a_run_that_fails_before_its_first_step_leaves_nothing(recipe, tmp_path):
    with pytest.raises(ValueError, match="no rank could ever move"):  # told by the allocator, once the folder is made
        late = {
            **recipe("pedyra", output="deep/run").model_dump(exclude_unset=True),
            "method": named("pedyra", interval=12),
        }
        run(Recipe.model_validate(late))
    assert list(tmp_path.iterdir()) == []


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


def test_the_report_tells_the_ranks_of_the_best_adapter(recipe):
    best = {"load_best_model_at_end": True, "save_steps": 2, "eval_steps": 2, "learning_rate": 0.5}
    folder = run(recipe("random", training=best)).folder.path
    final, read = read_rows(folder / "metrics.jsonl")[-1], read_run(folder)
    assert final["best_step"] < 12 and len(steps_of(folder, "eval")) == 6
    *layers, _ = inspect_adapter(folder)
    assert {row["layer"]: row["rank"] for row in layers} == read.final_ranks
    assert read.final_ranks != read.adjustments[-1]["ranks"]


def test_the_adapter_of_a_schedule_free_optimizer_is_saved_as_it_was_judged(recipe):
    pytest.importorskip("schedulefree")
    training = {"optim": "schedule_free_adamw", "eval_strategy": "no", "save_strategy": "no"}
    folder = run(recipe("lora", training=training)).folder.path
    final = read_rows(folder / "metrics.jsonl")[-1]
    assert evaluate_run(folder)["loss"] == pytest.approx(final["eval_loss"], rel=1e-5)

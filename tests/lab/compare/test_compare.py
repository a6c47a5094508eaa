"""A comparison from its grid to its tables, with a trainer that needs no model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pedyra.lab.compare.compare import compare_experiment, open_experiment
from pedyra.lab.compare.prepare import prepare_experiment
from pedyra.lab.compare.results import Comparison


def compare_grid(grid: Any, *where: Any, **more: Any) -> Comparison:
    return compare_experiment(open_experiment(grid), *where, **more)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rates_are_tuned_first_and_reported_runs_use_the_best(make_grid, calls, folder):
    comparison = compare_grid(make_grid())
    # 2 methods x 2 rates x 1 tuning seed, then 2 methods x 3 seeds at the higher rate, which the trainer rewards.
    assert sorted(calls()[:4]) == ["lora 1000 0.01", "lora 1000 0.1", "pedyra 1000 0.01", "pedyra 1000 0.1"]
    assert sorted(calls()[4:]) == [f"{method} {seed} 0.1" for method in ("lora", "pedyra") for seed in (0, 1, 2)]
    result = rows(folder / "runs/grid/comparison.jsonl")
    assert [row["value"] for row in result] == pytest.approx([0.51, 0.52, 0.53, 0.61, 0.62, 0.63])
    assert len(rows(folder / "runs/grid/tuning.jsonl")) == 4
    assert not comparison.failed and not comparison.missing


def test_tuning_runs_never_see_a_reported_row(make_grid, folder):
    compare_grid(make_grid())
    runs = folder / "runs/grid"
    tuning = yaml.safe_load((runs / "tuning/lora/toy/r2/lr0.1/seed1000.yaml").read_text())["data"]
    reported = yaml.safe_load((runs / "jobs/lora/toy/r2/lr0.1/seed0.yaml").read_text())["data"]
    names = [Path(data[key]).name for data in (tuning, reported) for key in ("source", "validation")]
    assert names == ["tuning-train.jsonl", "tuning.jsonl", "train.jsonl", "reported.jsonl"]
    judged = set((runs / "data/toy/reported.jsonl").read_text().splitlines())
    trained = set((runs / "data/toy/train.jsonl").read_text().splitlines())
    assert {json.loads(row)["group"] for row in judged}.isdisjoint(json.loads(row)["group"] for row in trained)


def test_the_tables_hold_the_statistics(make_grid, folder):
    compare_grid(make_grid())
    out = folder / "runs/grid"
    text = (out / "comparison.md").read_text()
    assert "| pedyra | 0.6200 ± 0.0058 | 50 (1.00×)" in text  # differences are 0.1 for every seed
    assert "+0.1000 [+0.1000, +0.1000]" in text
    assert "0.01: 10.50, 0.1: 10.51" in text  # the whole curve
    assert "warning: lora on toy, r = 2: the best rate, 0.1, is the highest of its grid" in text
    first = json.loads((out / "comparison.jsonl").read_text().splitlines()[0])
    assert (first["method"], first["value"], first["metrics"]["accuracy"]) == ("lora", 0.51, 0.51)


def test_where_the_loss_is_judged_the_metric_is_shown_beside_it(make_grid, folder):
    compare_grid(make_grid("judge=loss"))
    text = (folder / "runs/grid/comparison.md").read_text()
    assert "| method | toy (loss, less is better) | toy (accuracy) |" in text
    assert "| pedyra | 0.3800 ± 0.0058 | 0.6200 ± 0.0058 |" in text
    assert "+0.1000 [+0.1000, +0.1000]" in text  # less loss is a positive difference


def test_one_seed_has_no_interval(make_grid, folder):
    compare_grid(make_grid("seeds=[0]"))
    text = (folder / "runs/grid/comparison.md").read_text()
    assert "| pedyra | 0.6100 |" in text and "+0.1000 [one seed]" in text


def test_failures_are_reported_and_tried_again(make_grid, calls, folder):
    comparison = compare_grid(make_grid("learning_rates=[0.1]", training={"fake": {"lora": 0.5, "pedyra": "kill"}}))
    assert [end.job.entry.method for end in comparison.failed] == ["pedyra"] * 3 and comparison.missing == 3
    text = (folder / "runs/grid/comparison.md").read_text()
    assert "killed by SIGKILL" in text and "are missing" not in text  # told once, as what failed
    again = compare_grid(make_grid("learning_rates=[0.1]", training={"fake": {"lora": 0.5, "pedyra": "kill"}}))
    assert not again.failed and not again.missing
    assert calls()[6:] == [f"pedyra {seed} 0.1 --resume" for seed in (0, 1, 2)]


def test_a_row_whose_tuning_failed_has_no_rate_and_is_not_run(make_grid, calls, folder):
    comparison = compare_grid(make_grid(training={"fake": {"lora": 0.5, "pedyra": "crash"}}))
    assert len(comparison.failed) == 2 and comparison.missing == 3
    assert "no learning rate could be chosen for pedyra on toy" in (folder / "runs/grid/comparison.md").read_text()


def test_a_folder_with_runs_of_another_grid_is_refused(make_grid, calls, folder):
    compare_grid(make_grid())
    with pytest.raises(
        ValueError, match=r"seed1000 is a run of another grid: lora.dropout was None and is now 0.5; cho"
    ):
        compare_grid(make_grid("lora.dropout=0.5"))
    with pytest.raises(ValueError, match=r"data/toy holds other rows: eval_rows was None and is now 9; choose another"):
        compare_grid(make_grid("tasks.toy.eval_rows=9"))
    with pytest.raises(ValueError, match=r"jobs/lora/toy/\S+ is a run of another grid: lora.dropout was None"):
        compare_grid(make_grid("lora.dropout=0.5", "learning_rates=[0.1]"))  # nothing is tuned, but runs were reported
    done = len(calls())
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="photos holds no comparison"):
        compare_grid(make_grid("output_dir=photos"))
    assert len(calls()) == done


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_the_same_at_every_budget(use_rslora, make_grid, folder):
    lora = {"r": 2, "alpha": 4, "use_rslora": use_rslora}
    experiment = prepare_experiment(make_grid(lora=lora, budgets=[2, 8, 32]), folder)
    scalings = set()
    for entry in experiment.entries:
        result = experiment.content(entry, 0.1, "jobs")["lora"]
        scalings.add(round(result["alpha"] / (result["r"] ** 0.5 if use_rslora else result["r"]), 9))
    assert len(scalings) == 1 and len(experiment.entries) == 6


def test_rows_of_equal_parameters_keep_their_number(make_grid, folder):
    """Where rows are made equal in their parameters, a method that moves ranks holds that number, not that of ranks."""
    rows = {
        "lora": {},
        "pedyra": {},
        "prune": {"match": "rank"},
        "expand": {"method": {"name": "expand", "budget": "ranks"}},
    }
    experiment = prepare_experiment(make_grid(methods=rows, match="parameters"), folder)
    result = {
        entry.method: experiment.content(entry, 0.1, "jobs")["method"].get("budget") for entry in experiment.entries
    }
    assert result == {"lora": None, "pedyra": "parameters", "prune": None, "expand": "ranks"}


@pytest.mark.parametrize(("seeds", "message"), [([0, 1, 2], ["4.3", "2.78"]), ([0, 1, 2, 3, 4], [])])
def test_fewer_than_five_seeds_are_told_to_have_wide_intervals(make_grid, seeds, message):
    result = [remark for remark in Comparison(make_grid(seeds=seeds), [], []).remarks() if "intervals" in remark]
    assert bool(result) == bool(message) and all(number in result[0] for number in message)


def test_a_folder_can_be_moved_whose_rows_name_their_runs_from_there_on(make_grid, calls, folder):
    compare_grid(make_grid())
    done = len(calls())
    (folder / "runs/grid").rename(folder / "elsewhere")
    for name, count in (("comparison.jsonl", 6), ("tuning.jsonl", 4)):
        runs = [folder / "elsewhere" / row["run"] / "metrics.jsonl" for row in rows(folder / "elsewhere" / name)]
        assert len(runs) == count and all(run.is_file() for run in runs)
    assert len(compare_grid(make_grid("output_dir=elsewhere")).rows) == 6 and len(calls()) == done


@pytest.mark.parametrize(
    ("wider", "begun"),
    [
        ("seeds=[0, 1, 2, 3]", ["lora 3 0.1", "pedyra 3 0.1"]),
        (  # the trainer rewards the new rate, so every seed is run at it
            "learning_rates=[0.01, 0.1, 1]",
            ["lora 1000 1.0", "pedyra 1000 1.0"]
            + [f"{name} {seed} 1.0" for name in ("lora", "pedyra") for seed in (0, 1, 2)],
        ),
    ],
)
def test_a_wider_grid_keeps_what_is_done(make_grid, calls, wider, begun):
    compare_grid(make_grid())
    done = len(calls())
    compare_grid(make_grid(wider))
    assert calls()[done:] == begun


def test_a_narrower_call_shows_its_own_rows_and_a_wide_one_has_all_again(make_grid, calls, folder):
    compare_grid(make_grid())
    before, done = rows(folder / "runs/grid/comparison.jsonl"), len(calls())
    compare_grid(make_grid("methods=[lora]", "seeds=[0, 1]"))
    assert [row["method"] for row in rows(folder / "runs/grid/comparison.jsonl")] == ["lora", "lora"]
    compare_grid(make_grid())
    assert rows(folder / "runs/grid/comparison.jsonl") == before and len(calls()) == done


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"method": "lora", "lora": {"target_modules": ["query", "nope"]}}, "lora.target_modules: 'nope' matches no"),
    ],
)
def test_a_mistake_in_a_row_is_told_before_anything_runs(make_grid, calls, row, message):
    with pytest.raises(ValueError, match=f"methods.a on toy: {message}") as caught:
        compare_grid(make_grid(methods={"lora": {}, "a": row}))
    assert "\n" not in str(caught.value) and calls() == []


def test_a_grid_that_was_refused_can_be_corrected_in_its_folder(make_grid, calls):
    with pytest.raises(ValueError, match="method.intervall"):
        compare_grid(make_grid(methods={"lora": {}, "pedyra": {"method": {"intervall": 3}}}))
    comparison = compare_grid(make_grid("seeds=[0]"))
    assert not comparison.missing and len(calls()) == 6


def test_a_job_that_never_began_does_not_hold_its_folder_against_a_corrected_grid(make_grid, calls, monkeypatch):
    def start(*arguments, **more):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pedyra.lab.compare.jobs.subprocess.Popen", start)
        assert len(compare_grid(make_grid("learning_rates=[0.1]")).failed) == 6
    comparison = compare_grid(make_grid("learning_rates=[0.1]", "lora.dropout=0.5"))
    assert not comparison.missing and len(calls()) == 6


def test_progress_is_a_line_a_run(make_grid):
    out = io.StringIO()
    compare_grid(make_grid("learning_rates=[0.1]"), console=Console(file=out, width=200))
    text = out.getvalue()
    assert "0 to choose rates, 6 reported" in text and "[6/6]" in text
    assert "lora on toy, r = 2, rate 0.1, seed 0: accuracy 0.5100" in text

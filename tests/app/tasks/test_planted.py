"""The planted problem as a task: vectors from row numbers, the teacher's outputs, the error relative to the base's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from pedyra.app.models import load_model, load_tokenizer
from pedyra.app.recipe import check_recipe
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.tasks.named_tasks import task_data
from pedyra.app.tasks.planted import PROBLEM_SEED, make_problem, planted_task, relative_error
from pedyra.lab.compare.compare import prepare_experiment
from pedyra.lab.compare.grid import Grid

ROWS = [{"row": number} for number in range(40)]


def content(**data: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "model": {"name": "planted-design"},
        "data": {"source": "planted", "kind": "planted", **data},
    }


def predicted(task: Any, outputs: torch.Tensor) -> float:
    labels = np.array(task.eval["labels"], dtype=np.float32)
    return task.compute_metrics(EvalPrediction(outputs.numpy(), labels))["relative_error"]


def test_the_base_has_error_one_and_the_teacher_none():
    problem = make_problem("design", PROBLEM_SEED)
    task = planted_task(ROWS[:30], ROWS[30:], "design")
    x = torch.tensor(task.eval["inputs"])
    assert x.shape == (10, 64)
    # Row 37 is the eighth of the held-out ones, whatever rows are beside it.
    torch.testing.assert_close(x[7], torch.randn(64, generator=torch.Generator().manual_seed(37)))
    assert predicted(task, problem.base(x)) == pytest.approx(1.0, rel=1e-5)
    assert predicted(task, problem.teacher(x)) == pytest.approx(0.0, abs=1e-10)
    # Halfway in the outputs is a quarter of the squared distance.
    assert predicted(task, (problem.base(x) + problem.teacher(x)) / 2) == pytest.approx(0.25, rel=1e-5)


def test_the_model_is_the_base_of_the_same_problem():
    section = ModelSection(name="planted-sparse")
    model: Any = load_model(section, "planted", None, load_tokenizer(section), 0)
    problem = make_problem("sparse", PROBLEM_SEED)
    assert relative_error(problem, model.body) == pytest.approx(1.0)
    model.body.layers[0].weight.data.zero_()  # its own copy: the problem is the same afterwards
    again: Any = load_model(section, "planted", None, load_tokenizer(section), 0)
    assert relative_error(problem, again.body) == pytest.approx(1.0)
    x, labels = torch.randn(2, 3, 64)
    out = again(inputs=x, labels=labels)
    assert out.loss.item() == pytest.approx((problem.base(x) - labels).square().mean().item())


def test_model_and_data_of_different_problems_are_refused():
    with pytest.raises(ValueError, match="this data.kind planted goes with 'planted-sparse'"):
        check_recipe(content(profile="sparse"), "r.yaml")
    wrong = content() | {"data": {"source": "toy"}}
    with pytest.raises(ValueError, match="'planted-design' goes with data.kind planted, not classification"):
        check_recipe(wrong, "r.yaml")
    with pytest.raises(ValueError, match="data.text_pair has no meaning for data.kind planted"):
        check_recipe(content(text_pair="x"), "r.yaml")
    section = ModelSection(name="planted-desing")
    with pytest.raises(ValueError, match="'desing' is unknown; choose from design"):
        load_model(section, "planted", None, load_tokenizer(section), 0)


def test_a_row_can_have_its_own_bits_on_any_task(tmp_path: Any):
    rows = {"lora": {}, "pedyra on qlora": {"method": "pedyra", "quantization": "nf4"}}
    grid = Grid.model_validate(
        {
            **{"name": "g", "output_dir": str(tmp_path), "model": {"name": "tiny-bert"}, "lora": {"r": 2, "alpha": 4}},
            **{"methods": rows, "tasks": {"planted": {}, "toy": {"max_length": 48}}, "seeds": [0], "match": "rank"},
        }
    )
    experiment = prepare_experiment(grid, tmp_path)
    made = {(e.method, e.task): experiment.job(e, 0.1, 0, "jobs").recipe["model"] for e in experiment.entries}
    assert made["pedyra on qlora", "toy"] == {"name": "tiny-bert", "quantization": "nf4"}
    assert made["pedyra on qlora", "planted"] == {"name": "planted-design", "quantization": "nf4"}
    assert made["lora", "toy"] == {"name": "tiny-bert"}


def test_in_a_grid_it_brings_its_own_model_and_less_is_better(tmp_path: Any):
    tasks = {"planted": {}, "other": {"task": "planted", "profile": "sparse"}, "toy": {"max_length": 48}}
    grid = Grid.model_validate(
        {
            **{"name": "g", "output_dir": str(tmp_path), "model": {"name": "tiny-bert"}, "lora": {"r": 2, "alpha": 4}},
            **{"methods": ["lora"], "tasks": tasks, "seeds": [0], "match": "rank"},
        }
    )
    experiment = prepare_experiment(grid, tmp_path)
    made = {cell.task: experiment.job(cell, 0.1, 0, "jobs").recipe for cell in experiment.entries}
    models = {task: recipe["model"]["name"] for task, recipe in made.items()}
    assert models == {"planted": "planted-design", "other": "planted-sparse", "toy": "tiny-bert"}
    assert made["other"]["data"]["metric"] == "relative_error" and made["other"]["data"]["profile"] == "sparse"
    assert task_data("planted", None, None) == {"source": "planted", "kind": "planted"}

"""A section `fit` in a recipe: the run folder has both adapters, and what cannot be fitted is told before training."""

from __future__ import annotations

import json
from typing import Any

import pytest
from peft import PeftModel
from rich.console import Console

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import check_recipe
from pedyra.app.runs.run import train_run
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import resolve
from pedyra.errors import UserError
from pedyra.lora.folder import read_tensors


def recipe(folder: Any, **changes: Any) -> Any:
    content: dict[str, Any] = {
        "name": "short",
        "output_dir": str(folder),
        "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "kind": "classification", "max_length": 48, "train_rows": 96, "eval_rows": 96},
        "lora": {"r": 4, "alpha": 8},
        "fit": {"tolerance": "20%", "rows": 48},
        "training": {"max_steps": 40, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True},
    }
    return resolve(check_recipe({**content, **changes}, "recipe"))


@pytest.mark.parametrize("method", ["lora", "pissa"])  # PiSSA's factors hold a part of the weight while it trains
def test_the_run_folder_has_both_adapters(method, tmp_path):
    made = recipe(tmp_path / "run", method=method)
    result = train_run(made, console=Console(quiet=True))
    whole, smaller = (tmp_path / "run" / name / "adapter_model.safetensors" for name in ("adapter", "fit"))
    numbers = [sum(x.numel() for k, x in read_tensors(file).items() if "lora_" in k) for file in (whole, smaller)]
    assert result.fit is not None and 0 < numbers[1] <= numbers[0]
    assert numbers[1] == result.fit.row()["parameters"]
    record = json.loads((tmp_path / "run" / "fit" / "pedyra_fit.json").read_text())
    assert record["tolerance"] == pytest.approx(0.2 * record["won"])
    base = load_model(made.model, made.data.kind, 2, load_tokenizer(made.model), made.seed)
    PeftModel.from_pretrained(base, tmp_path / "run" / "fit")  # an ordinary folder


def test_an_adapter_that_is_no_lora_is_told_before_training(tmp_path):
    with pytest.raises(ValueError, match="method randlora trains an adapter of type .*RANDLORA"):
        train_run(recipe(tmp_path / "run", method="randlora"), console=Console(quiet=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_too_few_held_out_rows_are_told_before_training(tmp_path):
    data = {"source": "toy", "max_length": 48, "train_rows": 96, "eval_rows": 22}
    with pytest.raises(ValueError, match="fit takes 23 held-out rows or more, and data has 22"):
        train_run(recipe(tmp_path / "run", data=data), console=Console(quiet=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_fit_that_ends_in_an_error_loses_nothing_of_the_run(tmp_path, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise UserError("no size is small enough")

    monkeypatch.setattr("pedyra.app.runs.run.fit_trainer", refuse)
    with pytest.raises(UserError, match="the run is whole, but it could not be fitted: no size is small enough"):
        train_run(recipe(tmp_path / "run"), console=Console(quiet=True))
    assert RunFolder(tmp_path / "run").final
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_a_run_that_diverged_is_not_fitted(tmp_path):
    training = {"max_steps": 8, "learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "no"}
    result = train_run(recipe(tmp_path / "run", training=training), console=Console(quiet=True))
    assert result.diverged and result.fit is None


@pytest.mark.parametrize("given", [{"tolerance": "101%"}, {"tolerance": "much"}, {"rank": 0}, {"tolerence": 0.1}])
def test_a_mistake_names_the_key(given, tmp_path):
    with pytest.raises(ValueError, match=next(iter(given))):
        recipe(tmp_path, fit=given)

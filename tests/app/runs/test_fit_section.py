"""A section `fit` in a recipe: the run folder has both adapters, and what cannot be fitted is told before training."""

from __future__ import annotations

import errno
import json
from io import StringIO
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import check_recipe
from pedyra.app.runs.run import INTERRUPTED, train_run
from pedyra.app.runs.setup import resolve
from pedyra.errors import UserError
from pedyra.lora.inspection import read_tensors


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
    assert result.found is not None and 0 < numbers[1] <= numbers[0]
    assert numbers[1] == result.found.row()["parameters"]
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


def test_as_many_held_out_rows_as_that_are_enough(tmp_path):
    data = {"source": "toy", "max_length": 48, "train_rows": 96, "eval_rows": 23}
    with pytest.warns(UserWarning, match="there are 12 batches"):
        result = train_run(recipe(tmp_path / "run", data=data), console=Console(quiet=True))
    assert result.found is not None


@pytest.mark.parametrize("error", [UserError, torch.OutOfMemoryError])
def test_a_fit_that_ends_in_an_error_loses_nothing_of_the_run(tmp_path, monkeypatch, error):
    def refuse(*_: Any) -> Any:
        raise error("no size is small enough")

    monkeypatch.setattr("pedyra.app.runs.run.fit_trainer", refuse)
    result = train_run(recipe(tmp_path / "run"), console=Console(quiet=True))
    assert result.found is None and result.unfitted == "no size is small enough" and result.awaits_fit
    assert result.final is not None and (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_ctrl_c_in_a_fit_loses_nothing_of_the_run(tmp_path, monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("pedyra.app.runs.run.fit_trainer", interrupted)
    result = train_run(recipe(tmp_path / "run"), console=Console(quiet=True))
    assert result.found is None and result.unfitted == INTERRUPTED and result.awaits_fit
    assert result.final is not None


def test_a_fit_that_finds_no_space_is_told_and_its_run_is_whole(tmp_path, monkeypatch):
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pedyra.app.runs.run.Fit.save", save)
    screen = Console(record=True, width=500)
    result = train_run(recipe(tmp_path / "run"), console=screen)
    assert result.unfitted is not None and "free space, then pedyra fit" in result.unfitted
    assert result.final is not None and "proof" in screen.export_text()  # what was found, though it is not written


@pytest.mark.parametrize("terminal", [True, False])
def test_a_fit_at_a_terminal_shows_how_far_it_is(terminal, tmp_path, monkeypatch):
    def fitted(trainer: Any, *_: Any) -> Any:
        assert trainer.args.disable_tqdm is not terminal
        raise UserError("seen")

    monkeypatch.setattr("pedyra.app.runs.run.fit_trainer", fitted)
    console = Console(file=StringIO(), force_terminal=terminal)
    assert train_run(recipe(tmp_path / "run"), console=console).unfitted == "seen"


def test_a_run_that_diverged_is_not_fitted(tmp_path):
    training = {"max_steps": 8, "learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "no"}
    result = train_run(recipe(tmp_path / "run", training=training), console=Console(quiet=True))
    assert result.diverged and result.found is None and result.unfitted is None


@pytest.mark.parametrize("given", [{"tolerance": "101%"}, {"tolerance": "much"}, {"rank": 0}, {"tolerence": 0.1}])
def test_a_mistake_names_the_key(given, tmp_path):
    with pytest.raises(ValueError, match=next(iter(given))):
        recipe(tmp_path, fit=given)

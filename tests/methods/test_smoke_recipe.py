"""`pedyra train recipes/smoke.yaml method=NAME` and `pedyra eval` of its run, for every method there is."""

from __future__ import annotations

import warnings
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pedyra.app.recipe import load_recipe
from pedyra.app.runs.evaluate import evaluate_run
from pedyra.app.runs.run import train_run
from pedyra.lora.files import read_rows
from pedyra.methods.names import setting_names
from pedyra.methods.registry import METHODS

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
SHORTER = [
    *("training.max_steps=10", "training.eval_steps=5", "training.save_steps=5", "training.logging_steps=5"),
    *("data.train_rows=64", "data.eval_rows=32"),
]
WHEN = {"interval": 2, "initial_warmup": 2, "final_warmup": 2}


def named(method: str) -> list[str]:
    known = setting_names(method)
    return [f"method={method}", *(f"method.{key}={value}" for key, value in WHEN.items() if key in known)]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and PEFT's own
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_into_a_run_folder_that_evaluates_to_the_same(method: str, tmp_path: Path):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    recipe = load_recipe(SMOKE, [*named(method), f"output_dir={tmp_path / 'run'}", *SHORTER])
    result = train_run(recipe, console=Console(file=StringIO()))
    final = result.final
    assert final is not None and (final["step"], final["metric"]) == (recipe.training["max_steps"], "accuracy")
    assert final["trainable_parameters"] > 0 and result.rows()[0]["method"] == method
    assert read_rows(result.folder.metrics)[-1] == final
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The following rank_pattern keys")
        judged = evaluate_run(result.folder.path)
    assert judged["accuracy"] == final["value"]
    assert judged["loss"] == pytest.approx(final["eval_loss"], abs=1e-4)

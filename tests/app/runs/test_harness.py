"""`pedyra eval --harness` hands the adapted model to lm-evaluation-harness; a stub of it shows what it is given."""

from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from pedyra.app.recipe import Recipe
from pedyra.app.runs.harness import evaluate_by_harness
from pedyra.app.runs.run import train_run

CAUSAL = {"kind": "causal_lm", "prompt": "prompt", "completion": "completion"}


def trained(folder: Path, model: str = "tiny-llama", **data: Any) -> Path:
    recipe = {
        "name": "x",
        "method": "lora",
        "output_dir": str(folder / "run"),
        "model": {"name": model},
        "data": {"source": "toy", "train_rows": 32, "eval_rows": 8, **data},
        "training": {"max_steps": 4, "learning_rate": 0.05, "eval_strategy": "no", "use_cpu": True},
    }
    train_run(Recipe.model_validate(recipe), console=Console(file=StringIO()))
    return folder / "run"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stub: knows `known` and the tasks of included folders, and keeps what it was called with."""
    calls: list[dict[str, Any]] = []

    class TaskManager:
        def __init__(self, include_path: list[str] | None) -> None:
            self.all_tasks = [
                *("known", "unsafe"),
                *(file.stem for path in include_path or [] for file in Path(path).glob("*.yaml")),
            ]

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        calls.append(given)
        if "unsafe" in given["tasks"] and not given["confirm_run_unsafe_code"]:  # in the harness's own words
            raise ValueError(
                "Attempted to run task: unsafe which is marked as unsafe. Set confirm_run_unsafe_code=True"
            )
        scores = {"alias": "known", "acc,none": 0.25, "acc_stderr,none": 0.125}
        return {"results": {task: scores for task in given["tasks"]}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: SimpleNamespace(**given)},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_harness_is_given_the_base_with_its_adapter(harness: list[dict[str, Any]], tmp_path: Path):
    run = trained(tmp_path, **CAUSAL)
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    found = evaluate_by_harness(run, ["known", str(tmp_path / "mine.yaml")], limit=3)
    assert found == {f"{task}_{key}": value for task in ("known", "mine")
                     for key, value in (("acc", 0.25), ("acc_stderr", 0.125))}  # fmt: skip
    (call,) = harness
    assert (call["tasks"], call["limit"]) == (["known", "mine"], 3)
    lm = call["model"]
    assert lm.backend == "causal" and lm.batch_size == 64
    ids = torch.tensor([lm.tokenizer("the plot is dull. is it worth it? ")["input_ids"]])
    weights = [parameter for name, parameter in lm.pretrained.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        adapted = lm.pretrained(input_ids=ids).logits
        for weight in weights:
            weight.zero_()
        assert weights and not torch.allclose(adapted, lm.pretrained(input_ids=ids).logits)


def test_tasks_that_run_code_are_allowed_by_the_option_alone(
    harness: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    run = trained(tmp_path, **CAUSAL)
    with pytest.raises(ValueError, match="in no sandbox; allow it with --allow-code-execution"):
        evaluate_by_harness(run, ["unsafe"])
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    assert evaluate_by_harness(run, ["unsafe"], allow_code_execution=True)["unsafe_acc"] == 0.25
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


@pytest.mark.parametrize(
    ("tasks", "told"), [(["nown"], "has no task 'nown'"), (["none.yaml"], "none.yaml: there is no such file from")]
)
def test_a_task_that_is_not_there_is_told(
    harness: list[dict[str, Any]], tmp_path: Path, tasks: list[str], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pedyra.app.runs.harness.finished_run", lambda run: (None, recipe_of("causal_lm"), None))
    with pytest.raises(ValueError, match=told):
        evaluate_by_harness(tmp_path, tasks)
    monkeypatch.setattr("pedyra.app.runs.harness.finished_run", lambda run: (None, recipe_of("pairs"), None))
    with pytest.raises(
        ValueError, match="judges language models, of data.kind causal_lm or seq2seq; this run is pairs"
    ):
        evaluate_by_harness(tmp_path, ["known"])


def recipe_of(kind: str) -> Any:
    return SimpleNamespace(data=SimpleNamespace(kind=kind))


def test_without_the_harness_its_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[harness\]"'):
        evaluate_by_harness(tmp_path, ["known"])

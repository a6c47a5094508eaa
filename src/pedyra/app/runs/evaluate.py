"""`pedyra eval`: the saved adapter of a run is evaluated again on the run's held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.helpers import DoraCaching
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from pedyra.app.models.base import load_model, load_tokenizer, positions
from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.recipe_sections import GenerateSection
from pedyra.app.runs.resume import how_to_go_on
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import judge, judging, resolve
from pedyra.app.tasks.generation import WRITING, SampleFile, write_texts
from pedyra.app.tasks.sandbox import Sandbox
from pedyra.app.tasks.task import Task, load_task
from pedyra.app.tasks.test_sets import check_scorer, load_test_sets, score
from pedyra.errors import UserError
from pedyra.lora.files import digest
from pedyra.lora.folder import find_adapter, load_adapter
from pedyra.methods.adalora import NO_PENALTY


def evaluate_run(
    run: Path,
    *,
    console: Console | None = None,
    allow_code_execution: bool = False,
    generate: Mapping[str, GenerateSection] | None = None,
) -> dict[str, float]:
    """Return metric -> value of the task, the loss and the test sets, by default those of the run's recipe. Texts are
    saved in the run's samples.jsonl, so that an interrupted call resumes."""
    folder, recipe, adapter = finished_run(run)
    tokenizer, task = load_rows(recipe, run)
    console = console or Console(quiet=True)
    if folder.recorded("data_sha256") not in (None, task.digest()):
        console.print("the held-out rows are not those of the run's own evaluation", soft_wrap=True)
    generate = recipe.generate if generate is None else generate
    test_sets = load_test_sets(generate, recipe.data, tokenizer, task.held_out, recipe.seed)
    for test_set in test_sets:
        check_scorer(test_set.settings.score)
    sandbox = None
    if code := [test_set.name for test_set in test_sets if test_set.problems]:
        if not allow_code_execution:
            raise UserError(
                f"generate.{code[0]} judges code by running what the model writes; allow it with --allow-code-execution"
            )
        sandbox = Sandbox()  # which may refuse, before texts are generated
    model = adapted_model(recipe, adapter, task.num_labels, tokenizer)
    with judging(recipe, tokenizer, task, model) as trainer:
        metrics = judge(trainer)
    by_adapter = digest(adapter / "adapter_model.safetensors")
    for test_set in test_sets:
        settings = test_set.settings.model_dump(mode="json", include=WRITING)
        # DoRA's weight norm is the same for every token. The cache is larger than a whole 4-bit base.
        with DoraCaching(enabled=recipe.model.quantization == "none"):
            texts = write_texts(
                model.get_base_model(),  # pyright: ignore[reportArgumentType]
                tokenizer,
                test_set.prompts,
                test_set.settings,
                SampleFile(folder.samples, test_set.name, [by_adapter, settings, test_set.prompts, test_set.ends]),
                console,
                test_set.ends,
            )
        scores, notes = score(test_set, texts, sandbox)
        for note in notes:
            console.print(f"{test_set.name}: {note}", soft_wrap=True)
        metrics |= scores
    return metrics


def load_rows(recipe: Recipe, run: Path | None) -> tuple[PreTrainedTokenizerBase, Task]:
    """Load the tokenizer and the rows of a recipe, and refuse others than the run in this folder was trained on."""
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    if run is not None and RunFolder(run).recorded("train_sha256") not in (None, task.digest(train_only=True)):
        raise UserError(
            f"the training rows of {recipe.data.source}, or their tokens, are not those of {run}: what is held out of "
            f"them may have been trained on, and labels may have other numbers; bring them back"
        )
    return tokenizer, task


def finished_run(run: Path) -> tuple[RunFolder, Recipe, Path]:
    """Return a run's folder, its recipe as its method resolves it, and its adapter folder."""
    folder = RunFolder(run)
    if not folder.holds_run():
        raise UserError(
            f"{run} is no run folder (it lacks recipe.yaml or environment.json); give the output_dir of a training run"
        )
    recipe = resolve(load_recipe(folder.recipe))
    if folder.final is None and not folder.adapter.is_dir():
        raise UserError(f"the run in {run} is not finished; {how_to_go_on(recipe, folder)}")
    return folder, recipe, find_adapter(run)


def adapted_model(
    recipe: Recipe, adapter: Path, num_labels: int | None, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Load the recipe's base model with the adapter, by PEFT."""
    base = load_model(recipe.model, recipe.data.kind, num_labels, tokenizer, recipe.seed)
    # PEFT's AdaLoRA looks for its trainable adapter in any forward with labels, and adds its penalty to the loss.
    with warnings.catch_warnings():
        # Its masks are stored as `rank_pattern`, and PEFT first warns that they name no module.
        warnings.filterwarnings("ignore", r"The following rank_pattern keys .*\.lora_E'", RuntimeWarning)
        model = load_adapter(base, adapter, is_trainable=True)
    for config in model.peft_config.values():
        if hasattr(config, "orth_reg_weight"):
            config.orth_reg_weight = NO_PENALTY  # type: ignore[attr-defined]
    return model

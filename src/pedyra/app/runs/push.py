"""training.push_to_hub: the adapter of a run goes to the Hub at its end, and the smaller one of its fit beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedyra.app.recipe import Recipe
from pedyra.app.runs.processes import is_first
from pedyra.lora.hub import made_repository, push_folder

if TYPE_CHECKING:
    from pedyra.app.runs.run import RunResult


def ready_to_push(recipe: Recipe) -> None:
    """Make the repository before the training, so that a login that lacks is told then and not after it.

    Raises:
        ValueError: the recipe asks for a push, and the Hub says no.
    """
    training = recipe.training
    if training.get("push_to_hub") and is_first():
        made_repository(_name(recipe), private=training.get("hub_private_repo"), token=training.get("hub_token"))


def push_run(result: RunResult) -> str | None:
    """Push the adapter of a run that has ended, and its fit into the folder `fit`, where the recipe asks for it.

    Returns:
        The address of the repository; None where nothing is pushed: it was not asked for, or the run diverged.

    Raises:
        ValueError: the Hub says no; the adapter stays in the run folder, and the message says how to push it.
    """
    recipe, run = result.recipe, result.folder
    if not recipe.training.get("push_to_hub") or result.interrupted or result.diverged:
        return None
    given: dict[str, Any] = {"token": recipe.training.get("hub_token"), "revision": recipe.training.get("hub_revision")}
    given |= {"private": recipe.training.get("hub_private_repo")}
    try:
        address = push_folder(run.adapter, _name(recipe), **given)
        if result.found is not None:
            push_folder(run.path / "fit", _name(recipe), path_in_repo="fit", **given)
    except ValueError as error:
        raise ValueError(
            f"{error}. The run itself is whole; push its adapter with: hf upload {_name(recipe)} {run.adapter}"
        ) from error
    return address


def _name(recipe: Recipe) -> str:
    """Of the repository; as Trainer names it, after the output folder, where the recipe does not."""
    return recipe.training.get("hub_model_id") or Path(recipe.output_dir).absolute().name

"""The adapter of a run is merged into the base model that its recipe names."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.runs.run_folder import run_of
from pedyra.app.runs.setup import resolve
from pedyra.errors import UserError
from pedyra.export.export import export_adapter
from pedyra.export.loading import num_labels
from pedyra.export.merge import write_merged
from pedyra.export.readers import check_arguments
from pedyra.lora.folder import SavedLora, read_lora


def export_folder(path: Path, target: str, out: Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Do what `pedyra.export_adapter` does with a folder; that of a run is merged into the base of its recipe, with the
    tokenizer and the template of its training."""
    run = run_of(path)
    if target != "merged" or run is None:
        return export_adapter(path, target, out, base=base, overwrite=overwrite)
    check_arguments(target, out, base, overwrite)
    lora = read_lora(path)
    lora.check_supported("merged")
    return write_merged(*_base_of_recipe(resolve(load_recipe(run / "recipe.yaml")), lora, base), lora, out)


def _base_of_recipe(
    recipe: Recipe, lora: SavedLora, name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = recipe.model
    if name is not None:
        section = section.model_copy(update={"name": name, "revision": None, "quantization": "none"})
    if section.quantization != "none":
        raise UserError(
            f"the run's base model {section.name} is quantised ({section.quantization}), and merged weights would be "
            f"rounded to its few bits again; name the base to be loaded in float: --base {section.name}"
        )
    tokenizer = load_tokenizer(section)
    if recipe.data.chat_template is not None:  # by which the chats of the training were written
        tokenizer.chat_template = recipe.data.chat_template
    return load_model(section, recipe.data.kind, num_labels(lora), tokenizer, recipe.seed), tokenizer

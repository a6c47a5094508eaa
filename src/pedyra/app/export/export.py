"""export_adapter writes an adapter for other readers, or merged into the base model that its run's recipe names."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pedyra.app.export.merge import base_by_name, merge_into, save_merged
from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.runs.run_folder import run_of
from pedyra.app.runs.setup import resolve
from pedyra.errors import UserError
from pedyra.export.loading import num_labels
from pedyra.export.readers import check_arguments, check_base_unchanged, export_lora, write_export
from pedyra.lora.folder import SavedLora, saved_lora


def export_adapter(
    source: PeftModel | str | Path,
    target: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter of `source` into the folder `out` for one kind of reader, whole or not at all.

    Args:
        source: a live model (attached or not; its active adapter is written), an adapter folder as
            `model.save_pretrained` writes it, or a run folder. It is not changed.
        target: "peft" (small; PEFT and vLLM), "padded" (every layer zero-padded to the largest rank; any reader),
            "gguf" (a PEFT folder for llama.cpp's convert_lora_to_gguf.py), "merged" (the base model with the update
            in its weights, and its tokenizer where one is found).
        out: must not exist, or be empty; see `overwrite`.
        base: only for "merged": the name of the base model, which is loaded in float; by default the one that the
            run's recipe or `base_model_name_or_path` names.
        overwrite: replace an earlier export in `out`.

    Returns:
        `out`. It also holds `pedyra_export.json`; its `vllm.max_lora_rank` is the `--max-lora-rank` that vLLM needs.

    Raises:
        ValueError: an unknown target, no adapter, an `out` that holds files, DoRA or (gguf) a trained head that the
            format cannot hold, a base that is quantised or cannot be found.
    """
    out = Path(out)
    check_arguments(target, out, base, overwrite)
    if target != "merged":
        return export_lora(source, target, out)
    if isinstance(source, PeftModel):
        check_base_unchanged(source)
    with saved_lora(source) as lora:
        lora.check_supported("merged")
        name, recipe = None if base is None else str(base), None
        if isinstance(source, (str, Path)) and (run := run_of(Path(source))) is not None:
            recipe = resolve(load_recipe(run / "recipe.yaml"))
        model, tokenizer = base_by_name(lora, name) if recipe is None else _base_of_recipe(recipe, lora, name)
        before = _vocabulary(model)
        merged = merge_into(model, lora)
        if tokenizer is not None and tokenizer.name_or_path != str(lora.folder):
            tokenizer = _of_vocabulary(tokenizer, before, _vocabulary(merged))
    dtype = str(merged.dtype).removeprefix("torch.")
    record = {"target": "merged", "dtype": dtype, "tokenizer": tokenizer is not None}
    return write_export(out, record, lambda folder: save_merged(merged, tokenizer, folder))


def _vocabulary(model: PreTrainedModel) -> int | None:
    """Count the tokens that a model embeds; one of images embeds none."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _of_vocabulary(
    tokenizer: PreTrainedTokenizerBase, before: int | None, now: int | None
) -> PreTrainedTokenizerBase | None:
    """Leave out the tokenizer of the base where training has added tokens, which it would split."""
    if now == before:
        return tokenizer
    warnings.warn(
        f"training has resized the vocabulary from {before} tokens to {now}, and the tokenizer of the base model lacks "
        f"those that were added, so none is written beside the merged model; save there the one of the training",
        stacklevel=3,
    )
    return None


def _base_of_recipe(
    recipe: Recipe, lora: SavedLora, name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = recipe.model
    if name is not None:
        section = section.model_copy(update={"name": name, "revision": None, "quantization": "none"})
    if section.quantization != "none":
        raise UserError(
            f"the run's base model {section.name} is quantised ({section.quantization}), and merged weights would be "
            f"rounded to its few bits again; name the base to be loaded in float: --base {section.name}, in Python "
            f"export_adapter(run, 'merged', out, base={section.name!r})"
        )
    tokenizer = load_tokenizer(section)
    if recipe.data.chat_template is not None:  # by which the chats of the training were written
        tokenizer.chat_template = recipe.data.chat_template
    return load_model(section, recipe.data.kind, num_labels(lora), tokenizer, recipe.seed), tokenizer

"""A merge adds the update of an adapter to the weights of its base model, which has to be loaded for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pedyra.errors import UserError, as_user_error
from pedyra.export.hub import trusts_remote_code, why_not_loaded
from pedyra.export.loading import class_name, num_labels
from pedyra.export.readers import write_export
from pedyra.lora.folder import SavedLora, load_adapter
from pedyra.lora.layer import peft_layers


def write_merged(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, lora: SavedLora, out: Path) -> Path:
    """Merge the adapter into `base`, and write the folder `out` with the tokenizer and a record, whole or not at all;
    errors as of `merge_into`."""
    before = _vocabulary(base)
    merged = merge_into(base, lora)
    if tokenizer is not None and tokenizer.name_or_path != str(lora.folder):
        tokenizer = _of_vocabulary(tokenizer, before, _vocabulary(merged))
    dtype = str(merged.dtype).removeprefix("torch.")
    record = {"target": "merged", "dtype": dtype, "tokenizer": tokenizer is not None}
    if not getattr(merged.config, "tie_word_embeddings", True):
        _untie(merged)

    def save(folder: Path) -> None:
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return write_export(out, record, save)


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
        stacklevel=4,
    )
    return None


def _untie(model: nn.Module) -> None:
    """Give each name a Parameter of its own. PEFT unties the config of a model whose tied head it has trained whole, so
    that transformers, which writes a shared Parameter once, ties none of the other names to it (BART's two embeddings)
    when it reads the file, and draws them at random."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))


def merge_into(base: Any, lora: SavedLora) -> PreTrainedModel:
    """Merge a saved adapter into `base`, which is taken over and keeps its dtype.

    Raises:
        ValueError: the base is quantised or does not fit the adapter, or a weight that it changes is shared.
    """
    if getattr(base, "hf_quantizer", None) is not None or getattr(base, "quantization_method", None) is not None:
        raise UserError(
            f"the base model {base.name_or_path} is quantised, and merged weights would be rounded to its few bits "
            f"again; name one that is loaded in float: export_adapter(source, 'merged', out, base=name)"
        )
    adapted = load_adapter(base, lora.folder, lora.title)
    _check_place(adapted.get_base_model(), lora)
    _check_unshared(adapted.get_base_model())
    try:
        return adapted.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except RuntimeError as error:  # lora_bias on a layer that has no bias
        raise UserError(f"{lora.title} cannot be merged: {error}; export target peft") from error


def _check_place(base: nn.Module, lora: SavedLora) -> None:
    """Refuse factors that have no place in the model, which PEFT overlooks."""
    names = {name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    if missing := next((layer.name for layer in lora.layers if layer.name not in names), ""):
        raise UserError(f"{lora.title} does not fit the base model {type(base).__name__}, which has no layer {missing}")


def _check_unshared(base: nn.Module) -> None:
    """Refuse a layer whose weight some other module has too, into which it would be merged as well: a head and its
    embeddings (tied), those of an encoder and a decoder, or what `layer_replication` has repeated."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if "original_module" not in name.split("."):  # of a module that is trained whole: its own copy takes the place
            names.setdefault(id(parameter), []).append(_unwrapped(name).rpartition(".")[0])
    for layer in peft_layers(base, "default"):
        weight = getattr(layer.module.get_base_layer(), getattr(layer.module, "parameter_name", "weight"), None)
        if others := [name for name in names.get(id(weight), []) if name != _unwrapped(layer.name)]:
            raise UserError(
                f"{layer.name} and {others[0]} share one weight, which merging would change for both; export target "
                f"peft, or train without that layer"
            )


def _unwrapped(name: str) -> str:
    """Return the name that a module or a parameter has without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def base_by_name(lora: SavedLora, name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the base model that `name`, or the adapter's own config, says, and the tokenizer beside either."""
    config, revision = lora.config, None
    if name is None:
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise UserError(
            f"{lora.title} does not name its base model (base_model_name_or_path is empty); pass its name: "
            f"export_adapter(source, 'merged', out, base=name)"
        )
    head: dict[str, Any] = {}
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and (labels := num_labels(lora)) is not None:
        head = {"num_labels": labels, "ignore_mismatched_sizes": True}  # the saved head takes the base's place
    auto: Any = getattr(transformers, class_name(lora))
    which: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trusts_remote_code()}
    with as_user_error(f"the base model {name!r} of {lora.title} cannot be loaded", reason=why_not_loaded):
        model = auto.from_pretrained(name, dtype="auto", **which, **head)
    return model, _find_tokenizer(str(lora.folder)) or _find_tokenizer(name, **which)


def _find_tokenizer(place: str, **which: Any) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(place, **which)
    except (OSError, ValueError, ImportError):  # none there, or none that can be read here
        return None

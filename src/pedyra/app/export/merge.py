"""A merge adds the update of an adapter to the weights of its base model, which has to be loaded for it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pedyra.app.export.hub import trusts_remote_code, why_not_loaded
from pedyra.errors import UserError, telling
from pedyra.export.loading import num_labels
from pedyra.lora.folder import SavedLora, load_adapter
from pedyra.lora.layer import peft_layers

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Merged:
    """The model has the update in its weights, in the base's own dtype; its tokenizer is there where one was found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def record(self) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"target": "merged", "dtype": dtype, "tokenizer": self.tokenizer is not None}

    def save(self, folder: Path) -> None:
        if not getattr(self.model.config, "tie_word_embeddings", True):
            _untie(self.model)
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


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


def merge_live(model: PeftModel, adapter_name: str) -> Merged:
    """Merge a copy of a live model; the model itself stays as it is. Raises ValueError: the base is quantised or no
    transformers model, or an adapter is merged into it already."""
    base = model.get_base_model()
    _check_base(base)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged_adapters:
            raise UserError(
                f"adapter {module.merged_adapters[0]!r} is merged into {name}; call unmerge_adapter() first"
            )
    _check_unshared(base, adapter_name)
    # A hook may hold its allocator and optimizer, which must not be copied along.
    memo: dict[int, Any] = {id(vars(module)[kind]): OrderedDict() for module in model.modules() for kind in _HOOKS}
    merged = _merged(copy.deepcopy(model, memo), f"adapter {adapter_name!r}", [adapter_name])
    return Merged(merged, _tokenizer_of(base))


def merge_into(base: nn.Module, tokenizer: PreTrainedTokenizerBase | None, lora: SavedLora) -> Merged:
    """Merge a saved adapter into `base`, which is taken over. Raises ValueError: a quantised base, one that does not
    fit the adapter, or a start that cannot be repeated."""
    lora.check_supported("merged")
    _check_base(base)
    before = _vocabulary(base)
    adapted = _adapted(base, lora)
    _check_unshared(adapted.get_base_model(), "default")
    merged = _merged(adapted, lora.title)
    if tokenizer is not None and tokenizer.name_or_path != str(lora.folder) and _vocabulary(merged) != before:
        return Merged(merged, _left_out(_vocabulary(merged), before))
    return Merged(merged, tokenizer)


def _merged(adapted: PeftModel, title: str, names: list[str] | None = None) -> PreTrainedModel:
    try:
        return adapted.merge_and_unload(safe_merge=True, adapter_names=names)  # type: ignore[operator]
    except RuntimeError as error:  # lora_bias on a layer that has no bias
        raise UserError(f"{title} cannot be merged: {error}; export target peft") from error


def copied_base(base: nn.Module) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Copy a base model that somebody goes on using, and find the tokenizer it came with. Raises ValueError: it has an
    adapter in it, whose start (PiSSA) or merging may have changed its weights."""
    _check_base(base)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise UserError(
                f"the base has an adapter in it already, at {name} (get_peft_model changes the model that it is "
                f"given); give its name, or load it anew, or export the live model"
            )
    return copy.deepcopy(base), _tokenizer_of(base)


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, PreTrainedModel):
        raise UserError(
            f"the base is a {type(base).__name__}, no transformers model; merge it with model.merge_and_unload()"
        )
    if getattr(base, "hf_quantizer", None) is not None or getattr(base, "quantization_method", None) is not None:
        raise UserError(
            f"the base model {base.name_or_path or type(base).__name__} is quantised, and merged weights would be "
            f"rounded to its few bits again; load it in float and pass it: "
            f"export_adapter(source, 'merged', out, base=model or its name)"
        )


def _check_unshared(base: Any, adapter_name: str) -> None:
    """Refuse a layer whose weight some other module has too, into which it would be merged as well: a head and its
    embeddings (tied), those of an encoder and a decoder, or what `layer_replication` has repeated."""
    held = list(base.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in held:
        if "original_module" not in name.split("."):  # of a module that is trained whole: its own copy takes the place
            names.setdefault(id(parameter), []).append(_unwrapped(name).rpartition(".")[0])
    for layer in peft_layers(base, adapter_name):
        weight = getattr(layer.module.get_base_layer(), getattr(layer.module, "parameter_name", "weight"), None)
        if others := [name for name in names.get(id(weight), []) if name != _unwrapped(layer.name)]:
            raise UserError(
                f"{layer.name} and {others[0]} share one weight, which merging would change for both; export target "
                f"peft, or train without that layer"
            )


def _unwrapped(name: str) -> str:
    """Return the name that a module or a parameter has without PEFT's wrappers."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def base_by_name(lora: SavedLora, name: str | None) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Load the base model that `name`, or the adapter's own config, says, and the tokenizer beside either."""
    config, revision = lora.config, None
    if name is None:
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise UserError(
            f"{lora.title} does not name its base model (base_model_name_or_path is empty); pass it: "
            f"export_adapter(source, 'merged', out, base=model or its name)"
        )
    head: dict[str, Any] = {}
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and (labels := num_labels(lora)) is not None:
        head = {"num_labels": labels, "ignore_mismatched_sizes": True}  # the saved head takes the base's place
    auto: Any = getattr(transformers, _class_name(lora))
    which: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trusts_remote_code()}
    with telling(f"the base model {name!r} of {lora.title} cannot be loaded", reason=why_not_loaded):
        model = auto.from_pretrained(name, dtype="auto", **which, **head)
    return model, _find_tokenizer(str(lora.folder)) or _find_tokenizer(str(name), revision=revision)


def _class_name(lora: SavedLora) -> str:
    """Name the transformers class of the base: by task type, or the one recorded where the adapter has none."""
    task_type, recorded = lora.config.get("task_type"), lora.config.get("auto_mapping") or {}
    name = _AUTO_CLASSES.get(task_type) if task_type else recorded.get("base_model_class")
    if name is None or not hasattr(getattr(transformers, name, None), "from_pretrained"):
        raise UserError(
            f"{lora.title} does not say which class its base model has; pass it: "
            f"export_adapter(source, 'merged', out, base=model)"
        )
    return name


MORE_HEADS = ("classification_head", "logits_proj", "pooler", "pre_classifier", "sequence_summary")
"""Some classifiers draw these anew beside the heads that PEFT knows: BART, T5, XLNet, DeBERTa, DistilBERT and XLM."""


def _adapted(base: nn.Module, lora: SavedLora) -> PeftModel:
    model = load_adapter(base, lora.folder, lora.title)
    # PEFT overlooks factors in the file that have no place in the model.
    found = {name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
    if lost := [layer.name for layer in lora.layers if layer.name not in found]:
        raise UserError(f"{lora.title} does not fit the base model {type(base).__name__}, which has no layer {lost[0]}")
    return model


def _find_tokenizer(place: str, *, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    if not place:
        return None
    which: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trusts_remote_code()}
    try:
        return AutoTokenizer.from_pretrained(place, **which)
    except (OSError, ValueError, ImportError):  # none there, or none that can be read here
        return None


def _tokenizer_of(base: Any) -> PreTrainedTokenizerBase | None:
    """Find the tokenizer of a live base model; None, with a warning, where its vocabulary has been resized since."""
    place = str(getattr(base, "name_or_path", ""))
    if (tokenizer := _find_tokenizer(place)) is None:
        return None
    try:
        before = AutoConfig.from_pretrained(place, trust_remote_code=trusts_remote_code())
    except (OSError, ValueError, ImportError):  # a tokenizer alone, or a config that cannot be read here
        return tokenizer
    now, was = _vocabulary(base), getattr(before.get_text_config(), "vocab_size", None)
    return tokenizer if now == was else _left_out(now, was)


def _vocabulary(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _left_out(now: int | None, before: int | None) -> None:
    warnings.warn(
        f"training has resized the vocabulary from {before} tokens to {now}, and the tokenizer of the base model lacks "
        f"those that were added, so none is written beside the merged model; save there the one of the training",
        stacklevel=2,
    )

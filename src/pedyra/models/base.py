"""A recipe's base model, its tokenizer and its LoRA settings, ready for PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, TaskType, prepare_model_for_kbit_training
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from pedyra.hub import why_not_on_hub
from pedyra.lora.layer_names import pattern_keys
from pedyra.models.packaged import minilm_folder, smollm2_folder
from pedyra.models.planted import PlantedBase, base_model
from pedyra.models.quantized import keep_weight_layout, quantization_config
from pedyra.models.tiny import tiny_config, tiny_tokenizer
from pedyra.recipe_sections import LoraSection, ModelSection

PACKAGED = {"minilm": minilm_folder, "smollm2": smollm2_folder}
TINY = ("tiny-bert", "tiny-llama")


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with the end token as padding where it has none of its own.

    Raises ValueError if there is no such model, ImportError if the package that carries it is missing.
    """
    if section.tokenizer is None and section.name in TINY:
        return tiny_tokenizer(section.name)
    if section.name.startswith("planted-"):
        return tiny_tokenizer("tiny-bert")  # its inputs are vectors, but a run always has a tokenizer
    if section.tokenizer is None:
        tokenizer = _from_pretrained(AutoTokenizer, _source(section), section)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, section.tokenizer, section, key="tokenizer")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    section: ModelSection, kind: str, num_labels: int | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The base model with the head of the task: `causal_lm`, or a classifier (`regression`: one output).

    A new head is drawn with `seed`, and the global seeds are set to it. Quantised weights come prepared for
    training. Raises ValueError and ImportError as `load_tokenizer`.
    """
    set_seed(seed)
    head: dict[str, Any] = {}
    auto = AutoModelForCausalLM
    if kind != "causal_lm":
        auto = AutoModelForSequenceClassification
        problem = "regression" if kind == "regression" else "single_label_classification"
        head = dict(num_labels=num_labels, problem_type=problem)
    if section.name.startswith("planted-"):
        model = _planted_model(section)
    elif section.name in TINY:
        model = _tiny_model(auto, section, head, len(tokenizer))
    else:
        model = _from_pretrained(auto, _source(section), section, **_loading(section, head), **head)
    if kind == "causal_lm":
        _check_causal(model, section)
    model.config.pad_token_id = tokenizer.pad_token_id
    if section.quantization != "none":
        # Trainer turns gradient checkpointing on where `training` asks for it.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_weight_layout(model)
    return model


def lora_config(section: LoraSection, kind: str, ranks: Mapping[str, int] | None = None) -> LoraConfig:
    """PEFT's LoraConfig; the task type follows from the kind of data, so that a new head is trained and saved.

    Args:
        ranks: `layer_ranks` of the section's: these layers are adapted, all with the scaling alpha / r.
    """
    keys = pattern_keys(ranks or {})
    scaling = section.alpha / section.r
    return LoraConfig(
        task_type={"causal_lm": TaskType.CAUSAL_LM, "planted": None}.get(kind, TaskType.SEQ_CLS),
        r=section.r,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType] (PEFT takes fractions too)
        lora_dropout=section.dropout,
        target_modules=section.target_modules if ranks is None else list(ranks),
        exclude_modules=section.exclude_modules if ranks is None else None,
        rank_pattern={keys[name]: rank for name, rank in (ranks or {}).items()},
        alpha_pattern={keys[name]: rank * scaling for name, rank in (ranks or {}).items()},  # pyright: ignore[reportArgumentType]
        init_lora_weights=section.init,  # pyright: ignore[reportArgumentType] (PEFT checks the name)
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        bias=section.bias,
        modules_to_save=section.modules_to_save,
    )


def _source(section: ModelSection) -> str:
    return str(PACKAGED[section.name]()) if section.name in PACKAGED else section.name


def _loading(section: ModelSection, head: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"dtype": section.dtype}
    if section.attn_implementation is not None:
        arguments["attn_implementation"] = section.attn_implementation
    if section.quantization != "none":
        compute = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
        arguments["quantization_config"] = quantization_config(
            section.quantization, compute, heads=["classifier", "score"] if head else None
        )
    return arguments


def _from_pretrained(auto: Any, source: str, section: ModelSection, *, key: str = "name", **arguments: Any) -> Any:
    given = getattr(section, key)
    if not Path(source).exists() and (reason := why_not_on_hub(source, "model", section.revision)) is not None:
        near = get_close_matches(given, [*PACKAGED, *TINY], n=1) if key == "name" else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model.{key} {given!r} is no folder from {Path.cwd()}, and {reason}{hint}")
    try:
        return auto.from_pretrained(
            source, revision=section.revision or "main", trust_remote_code=section.trust_remote_code, **arguments
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"model.name {section.name!r} has weights of other sizes than the task's model, such as a head of another "
            f"number of classes than data.num_labels {arguments.get('num_labels')}; save it without its head first"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        # transformers explains at length; its first line says what happened.
        told = str(error).strip().splitlines()[0]
        raise ValueError(f"model.{key} {given!r} cannot be loaded: {told}") from error


def _check_causal(model: PreTrainedModel, section: ModelSection) -> None:
    """transformers gives an encoder a language-model head, too; it then sees the answer it is asked for."""
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"model.name {section.name!r} is an encoder ({model.config.model_type}), which sees the tokens it is to "
            f"predict; data.kind causal_lm needs a decoder such as a Llama"
        )


def _tiny_model(auto: Any, section: ModelSection, head: dict[str, Any], vocab_size: int) -> PreTrainedModel:
    config = tiny_config(section.name, vocab_size)
    for key, value in head.items():
        setattr(config, key, value)
    if section.quantization == "none":
        return auto.from_config(config, dtype="float32" if section.dtype == "auto" else section.dtype)
    # By way of a folder, since weights are quantised as they are read.
    with TemporaryDirectory() as folder:
        auto.from_config(config).save_pretrained(folder)
        return _from_pretrained(auto, folder, section, **_loading(section, head))


def _planted_model(section: ModelSection) -> PreTrainedModel:
    model = base_model(section.name.removeprefix("planted-"))
    if section.quantization == "none":
        return model if section.dtype == "auto" else model.to(getattr(torch, section.dtype))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _from_pretrained(PlantedBase, folder, section, **_loading(section, {}))

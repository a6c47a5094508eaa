"""A recipe's base model and its tokenizer are loaded for PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import TaskType, prepare_model_for_kbit_training
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from pedyra.app.models.packaged import minilm_folder, smollm2_folder
from pedyra.app.models.quantized import keep_weight_layout, quantization_config
from pedyra.app.models.tiny import TINY, tiny_config, tiny_tokenizer
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.tasks.tokens import positions_of
from pedyra.errors import UserError, as_user_error
from pedyra.export.hub import trusts_remote_code, why_not_loaded, why_not_on_hub
from pedyra.lora.spelling import did_you_mean

PACKAGED = {"minilm": minilm_folder, "smollm2": smollm2_folder}
_CLASSIFIER = (AutoModelForSequenceClassification, TaskType.SEQ_CLS)
HEADS: dict[str, tuple[Any, TaskType | None]] = {
    "causal_lm": (AutoModelForCausalLM, TaskType.CAUSAL_LM),
    "seq2seq": (AutoModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM),
    "question_answering": (AutoModelForQuestionAnswering, TaskType.QUESTION_ANS),
}
"""A kind of data has this model class of transformers and task type of PEFT; any other kind is a classifier."""
MORE_HEADS = ("classification_head", "logits_proj", "pooler", "pre_classifier", "sequence_summary")
"""Heads that PEFT does not know, of the classifiers BART, T5, XLNet, DeBERTa, DistilBERT and XLM."""


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it pads and truncates on the right, with the end token where it has no padding token."""
    if section.tokenizer is None and section.name in TINY:
        return tiny_tokenizer(section.name)
    if section.tokenizer is None:
        tokenizer = _from_pretrained(AutoTokenizer, _source(section), section)
    else:
        tokenizer = _from_pretrained(AutoTokenizer, section.tokenizer, section, key="tokenizer")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    section: ModelSection, kind: str, num_labels: int | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Load the base model with the head of the task (`HEADS`), which is drawn with `seed` where it is new.

    The global seeds are set to it. Quantised weights come prepared for training. `random_weights` of the model names
    what its checkpoint lacks, see `models.lora.check_random_weights`.
    """
    set_seed(seed)
    if section.name in TINY and section.quantization == "none":
        return shape_of(section, kind, num_labels, tokenizer)
    auto, head = HEADS.get(kind, _CLASSIFIER)[0], _head(kind, num_labels)
    if section.name in TINY:  # weights are quantised while they are loaded from a folder
        plain = section.model_copy(update={"quantization": "none", "dtype": "float32"})
        with TemporaryDirectory() as folder:
            shape_of(plain, kind, num_labels, tokenizer).save_pretrained(folder)
            model = _from_pretrained(auto, folder, section, **_loading(section, kind))
    else:
        # A class of the model's repository may not return the loading info.
        options = {} if trusts_remote_code() else {"output_loading_info": True}
        model = _from_pretrained(auto, _source(section), section, **_loading(section, kind), **options, **head)
        if options:
            model, loading_info = model
            model.random_weights = _random_weights(model, loading_info["missing_keys"])
    _set_padding_and_dropout(model, section, tokenizer)
    if section.quantization != "none":
        # Trainer turns gradient checkpointing on, where `training` has it.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_weight_layout(model)
    return model


def _random_weights(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """List the parameters that the checkpoint lacks and that are random: no buffers, no sine tables (Pegasus)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in parameters}
    return sorted(name for name in missing if name in owners and "Sinusoidal" not in owners[name])


def shape_of(
    section: ModelSection, kind: str, num_labels: int | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Make the model of `load_model` from its config alone, on the current device; no weights are read."""
    auto, head = HEADS.get(kind, _CLASSIFIER)[0], _head(kind, num_labels)
    if section.name in TINY:
        config = tiny_config(section.name, len(tokenizer))
        config.update(head)
    else:
        config = _from_pretrained(AutoConfig, _source(section), section, **head)
    if auto is AutoModelForCausalLM and not trusts_remote_code():
        _check_decoder(config, section)
    arguments = _loading(section, kind)
    arguments.pop("quantization_config", None)
    dtype = arguments.pop("dtype")
    if section.quantization != "none":
        dtype = "float32"  # so `prepare_model_for_kbit_training` leaves what is not quantised
    elif dtype == "auto":
        dtype = getattr(config, "dtype", None) or "float32"
    with as_user_error(f"model.name {section.name!r} cannot be loaded", reason=why_not_loaded):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trusts_remote_code(), **arguments)
    _set_padding_and_dropout(model, section, tokenizer)
    return model


def positions(section: ModelSection) -> int | None:
    """Return how many tokens of a row the base takes, None for any number."""
    if section.name in TINY:
        return positions_of(tiny_config(section.name, 1))
    return positions_of(_from_pretrained(AutoConfig, _source(section), section))


def task_type(kind: str) -> TaskType | None:
    return HEADS.get(kind, _CLASSIFIER)[1]


def _head(kind: str, num_labels: int | None) -> dict[str, Any]:
    """Return what the config of a classifier says of its head; nothing for other kinds."""
    problem = "regression" if kind == "regression" else "single_label_classification"
    return {} if kind in HEADS else {"num_labels": num_labels, "problem_type": problem}


def names_model(recorded: str, section: ModelSection) -> bool:
    """Tell whether the base that an adapter records is this model, by its name or its folder."""
    source = section.name if section.name in TINY else _source(section)
    return recorded in (section.name, source) or Path(recorded).resolve() == Path(source).resolve()


def _source(section: ModelSection) -> str:
    return str(PACKAGED[section.name]()) if section.name in PACKAGED else section.name


def _loading(section: ModelSection, kind: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"dtype": section.dtype}
    if section.attn_implementation is not None:
        if "/" in section.attn_implementation and not trusts_remote_code():
            raise UserError(
                f"model.attn_implementation {section.attn_implementation!r} is code on the Hub; if you trust its "
                f"authors, run it with --trust-remote-code"
            )
        arguments["attn_implementation"] = section.attn_implementation
    if section.quantization != "none":
        compute = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
        heads = None if kind in ("causal_lm", "seq2seq") else [*SEQ_CLS_HEAD_NAMES, "qa_outputs", *MORE_HEADS]
        arguments["quantization_config"] = quantization_config(section.quantization, compute, heads=heads)
    return arguments


def _from_pretrained(auto: Any, source: str, section: ModelSection, *, key: str = "name", **arguments: Any) -> Any:
    value = getattr(section, key)
    revision = section.revision if value == section.name else None  # of the model, not of another repository
    if not Path(source).exists() and (reason := why_not_on_hub(source, "model", revision)) is not None:
        hint = did_you_mean(value, [*PACKAGED, *TINY], otherwise="") if key == "name" else ""
        raise UserError(f"model.{key} {value!r} is no folder from {Path.cwd()}, and {reason}{hint and '; '}{hint}")
    if auto is AutoModelForCausalLM and not trusts_remote_code():
        _check_decoder(_from_pretrained(AutoConfig, source, section, key=key), section)
    with as_user_error(f"model.{key} {value!r} cannot be loaded", reason=why_not_loaded):
        return auto.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trusts_remote_code(), **arguments
        )


def _check_decoder(config: PretrainedConfig, section: ModelSection) -> None:
    """Refuse an encoder, or an encoder-decoder, that transformers would silently train as a causal LM."""
    kind, where = config.model_type, f"model.name {section.name!r}"
    if getattr(config, "is_encoder_decoder", False):  # it takes the decoder alone
        raise UserError(
            f"{where} is an encoder-decoder ({kind}), which would be trained without its encoder; use data.kind seq2seq"
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(
            f"{where} is an encoder ({kind}), which sees the tokens it is to predict; data.kind causal_lm needs a "
            f"decoder such as a Llama"
        )


def _set_padding_and_dropout(model: PreTrainedModel, section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding token, and the dropout before the head, which BERT and DeBERTa have beside it, RoBERTa inside."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if section.head_dropout is None:
        return
    modules: dict[str, Any] = dict(model.named_modules())
    dropout = next(
        (m for name in ("dropout", "classifier.dropout") if type(m := modules.get(name)) is nn.Dropout), None
    )
    if dropout is None:
        raise UserError(
            f"model.head_dropout is {section.head_dropout}, but {type(model).__name__} has no dropout before its head; "
            f"remove it"
        )
    dropout.p = section.head_dropout

"""The sections of a recipe: base model, data, LoRA. What their keys mean, and what they may be.

Nothing heavy is imported here, as in `pedyra.recipe`.
"""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pedyra.lora.rank_file import read_ranks

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "pairs": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal_lm": ("perplexity",),
    "planted": ("relative_error",),
}
"""Metrics of each kind of data; the first is the default of `data.metric`."""

MOST_CLASSES = 100_000
"""Numbers beyond it are no class numbers, and a head of so many outputs would fill the memory."""

Ranks = Annotated[
    dict[str, int] | None,
    BeforeValidator(read_ranks),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
                {"type": "string"},
                {"type": "null"},
            ]
        }
    ),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`r: true` is no rank of 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return value


class ModelSection(Section):
    """The base model."""

    name: str
    """Hub id, local folder, or a packaged name: minilm, smollm2, tiny-bert, tiny-llama, planted-<data.profile>."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: str | None = None
    """Hub id or local folder of the tokenizer; default: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights; the compute type when they are quantised."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Frozen weights in 4 or 8 bits; needs pedyra[quant]."""
    attn_implementation: str | None = None
    """Passed to from_pretrained: eager, sdpa, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Run the code that a Hub repository carries."""


class LoraSection(Section):
    """The LoRA every method starts from; the names are PEFT's, without the prefix `lora_`."""

    r: int = Field(default=8, ge=1)
    """Rank of each layer at the start; layers x r is the budget."""
    ranks: Ranks = None
    """Layer name or its last parts -> rank of a fixed-rank LoRA, or the file of `pedyra search`; others get none.

    Takes the place of target_modules; the scaling stays alpha / r.
    """
    alpha: int | float = Field(default=16, gt=0, allow_inf_nan=False)
    """Scaling is alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what goes into the adapter, while training."""
    target_modules: str | list[str] = "all-linear"
    """Suffixes of module names, a regular expression, or all-linear."""
    exclude_modules: str | list[str] | None = None
    """Modules that target_modules would match and that are left out."""
    init: bool | str = True
    """PEFT's init_lora_weights: true, gaussian, orthogonal, pissa, pissa_niter_4, olora, ..."""
    use_dora: bool = False
    """DoRA: a trained magnitude per output beside the adapter."""
    use_rslora: bool = False
    """rsLoRA: scaling alpha / sqrt(r)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapter; a new classification head always is."""

    @model_validator(mode="before")
    @classmethod
    def _named_as_in_peft(cls, data: Any) -> Any:
        if isinstance(data, dict) and "rank" in data:  # the nearest known key would be `ranks`, which is another thing
            raise ValueError("unknown key 'lora.rank'; did you mean 'lora.r'?")
        return data

    @model_validator(mode="after")
    def _one_scaling(self) -> LoraSection:
        if self.init == "eva":  # PEFT would start like any LoRA until it is handed data
            raise ValueError("lora.init 'eva' looks at the data first, which is the method eva: set method to eva")
        if self.ranks is not None and self.use_rslora:
            raise ValueError(
                "lora.use_rslora makes the scaling depend on the rank, which lora.ranks gives by layer; turn one off"
            )
        return self


class DataSection(Section):
    """The data set, which of its columns mean what, and how it is split."""

    source: str
    """reviews (packaged), toy, planted (generated), a .jsonl/.json/.csv/.tsv/.parquet file (or .gz/.bz2), a Hub id."""
    kind: Literal["classification", "pairs", "regression", "causal_lm", "planted"] = "classification"
    """What is learned from the rows: a class, a class of two texts, a number, an answer, or the planted problem."""
    config: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Training split of a Hub data set."""
    validation: str | None = None
    """Split of the Hub data set, or a second local file; default: a part of the training rows."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the rows held out when there is no `validation`."""
    group_by: str | None = None
    """Column whose equal values stay on one side of the split."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Second text column; required by `pairs`, possible for `regression`."""
    label: str = "label"
    """Class number or class name; a number for `regression`."""
    labels: list[str] | None = None
    """Class names in the order of their numbers; default: the names found, sorted."""
    num_labels: int | None = Field(default=None, ge=2, le=MOST_CLASSES)
    """Number of classes; default: as found in the training rows."""
    prompt: str | None = None
    """causal_lm: column before the answer."""
    template: str | None = None
    """causal_lm: the prompt as text with {column} places, instead of `prompt`."""
    completion: str | None = None
    """causal_lm: column of the answer, the only tokens with a loss."""
    messages: str | None = None
    """causal_lm: column of chat messages, each {role, content}; the loss is on the assistant's turns."""
    chat_template: str | None = None
    """Jinja chat template, for a tokenizer that has none."""
    profile: str = "design"
    """planted: the true ranks: design, sparse, linear, uniform or random; model.name is planted-<profile>."""
    max_length: int = Field(default=128, ge=2)
    """Tokens; longer rows are cut at the end."""
    train_rows: int | None = Field(default=None, ge=1)
    """At most this many training rows, drawn with the seed."""
    eval_rows: int | None = Field(default=None, ge=1)
    """At most this many held-out rows, drawn with the seed."""
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "perplexity", "relative_error"] | None = None
    """What a run is judged by; default: accuracy, pearson, perplexity or relative_error, by kind."""

    @model_validator(mode="after")
    def _columns_fit_the_kind(self) -> DataSection:
        causal = ("prompt", "template", "messages", "completion", "chat_template")
        labelled = ("text", "text_pair", "label", "labels", "num_labels")
        foreign = {
            "causal_lm": (*labelled, "profile"),
            "planted": (*labelled, *causal, "max_length", "group_by"),
        }.get(self.kind, (*causal, "profile"))
        for key in foreign:
            # Compared with the default, because a resolved recipe repeats every default.
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"data.{key} has no meaning for data.kind {self.kind}; remove it")
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            known = ", ".join(METRICS[self.kind])
            raise ValueError(f"data.metric {self.metric} is none of data.kind {self.kind}; choose from {known}")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"data.labels is {self.labels}; it names two classes or more, each once")
        if self.kind == "pairs" and self.text_pair is None:
            raise ValueError("data.kind pairs compares two text columns; name the second as data.text_pair")
        if self.kind == "causal_lm":
            prompts = [key for key in causal[:3] if getattr(self, key) is not None]
            if len(prompts) != 1:
                given = " and ".join(prompts) or "none"
                raise ValueError(f"data.kind causal_lm takes one of prompt, template, messages; given: {given}")
            if (self.completion is None) != (prompts == ["messages"]):
                raise ValueError("data.completion goes with data.prompt or data.template, not with data.messages")
            if self.template is not None and not template_columns(self.template):
                raise ValueError(f"data.template {self.template!r} has no {{column}} place, so all prompts are alike")
        return self


def template_columns(template: str) -> list[str]:
    """The columns that `data.template` has places for. Raises ValueError for braces that do not pair."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"data.template {template!r}: {error}; a brace itself is written twice") from None

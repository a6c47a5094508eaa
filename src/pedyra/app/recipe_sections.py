"""The sections of a recipe say what its keys mean, and what they may be; nothing heavy is imported here."""

from __future__ import annotations

import os.path
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pedyra.errors import UserError
from pedyra.lora.supported import check_supported
from pedyra.methods.names import check_method, make_method

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "pairs": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "combined"),
    "causal_lm": ("perplexity",),
    "seq2seq": ("perplexity",),
    "question_answering": ("f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact"),
}
"""Kind of data -> its metrics on held-out rows; the first is the default of `data.metric`."""

LOWER_IS_BETTER = ("loss", "perplexity")
GENERATED = ("causal_lm", "seq2seq")  # the kinds whose models generate text
LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


HomePath = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, or a name, that may begin with ~


class ModelSection(Section):
    """The base model, and how it is loaded."""

    name: HomePath
    """Hub id, local folder, or a packaged name: minilm, smollm2, tiny-<bert|bart|...>."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    tokenizer: HomePath | None = None
    """Hub id or local folder of the tokenizer; default: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights; the compute type when they are quantised."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Frozen weights in 4 or 8 bits; needs pedyra[quant]."""
    head_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout before a classification head, while training; default: the model's own."""
    attn_implementation: str | None = None
    """Passed to from_pretrained: eager, sdpa, flash_attention_2, ...; a Hub kernel needs --trust-remote-code."""


class MethodSection(BaseModel):
    """A method and the fields of its class: `method: {name: increlora, final_rank: 8}`. A bare name is its defaults."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "lora"
    """Fine-tuning method: lora, pedyra, adalora, ..."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, content: Any) -> Any:
        return {"name": content} if isinstance(content, str) else content

    @model_validator(mode="after")
    def _check_name(self) -> MethodSection:
        check_method(self.name)
        if self.settings:  # the class, and torch with it, is loaded for those alone
            make_method(self.name, self.settings)
        return self


class LoraSection(Section):
    """The LoRA that every method begins with; the names are PEFT's, without the prefix `lora_`."""

    r: int = Field(default=8, ge=1, le=65_536)  # more would fill the memory before PEFT could tell
    """Rank of each layer at the start."""
    alpha: int | float = Field(default=16, gt=0, allow_inf_nan=False)
    """Scaling is alpha / r (alpha / sqrt(r) with use_rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter, while training."""
    target_modules: str | list[str] = "all-linear"
    """Suffixes of module names, a regular expression, or all-linear."""
    exclude_modules: str | list[str] | None = None
    """Modules that target_modules would match and that are left out."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Ranks of layers that have another than r, by module name as PEFT matches it; their scaling stays that of r."""
    init: bool | str = True
    """PEFT's init_lora_weights: true, gaussian, orthogonal, pissa, pissa_niter_4, olora, ..."""
    use_dora: bool = False
    """DoRA: a trained magnitude per output beside the adapter."""
    use_rslora: bool = False
    """rsLoRA: scaling alpha / sqrt(r)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """PEFT trains these biases beside the adapter."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapter; a new classification head always is."""

    @model_validator(mode="after")
    def _can_start(self) -> LoraSection:
        # Without data PEFT would use the default start, or, for CorDA, raise an error about one of its functions.
        if self.init in ("eva", "lora_ga", "corda"):
            raise UserError(
                f"lora.init {self.init!r} needs a pass over the data, which a recipe does not do; use another start, "
                f"or initialise the adapter with PEFT and train it by pedyra.adapt"
            )
        if self.init == "loftq":  # PEFT fails with a KeyError
            check_supported("adapt", "lora.init", {"init_lora_weights": self.init})
        return self


class DataSection(Section):
    """The data set, the meaning of its columns, and its split."""

    source: str
    """reviews (packaged), toy (generated), a .jsonl/.json/.csv/.tsv/.parquet file (or .gz/.bz2), a Hub id."""
    kind: Literal["classification", "pairs", "regression", "question_answering", "causal_lm", "seq2seq"] = (
        "classification"
    )
    """The task of each row.

    A class, a class of two texts, a number, the span of a text that answers a question, the continuation of a prompt
    (decoders) or a text made of one (encoder-decoders). Questions have the columns of SQuAD: question, context,
    and answers, {text: [...], answer_start: [...]} with empty lists where there is no answer.
    """
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
    label: str | None = "label"
    """Class number or class name; a number for `regression`. Null: the rows have none, so that nothing is trained."""
    labels: list[str] | None = None
    """Class names in the order of their numbers; default: the names found, sorted."""
    num_labels: int | None = Field(default=None, ge=2, le=100_000)  # a head of more outputs would fill the memory
    """Number of classes; default: as found in the training rows."""
    doc_stride: int = Field(default=128, ge=1)
    """question_answering: tokens by which the parts of a context longer than max_length overlap."""
    prompt: str | None = None
    """causal_lm, seq2seq: column before the answer."""
    template: str | None = None
    """causal_lm, seq2seq: the prompt as text with {column} places, instead of `prompt`; {column:.500} cuts a text."""
    completion: str | None = None
    """causal_lm, seq2seq: column of the answer, the only tokens with a loss; without a prompt, of the whole text. Null
    beside a prompt: the rows have none, so that nothing is trained."""
    max_target_length: int = Field(default=64, ge=2)
    """seq2seq: tokens of the answer; longer ones are cut at the end."""
    messages: str | None = None
    """causal_lm: column of chat messages, each {role, content}; the loss is on the assistant's turns. A column `tools`
    beside it has the tools that a chat may call."""
    chat_template: str | None = None
    """Jinja chat template, for a tokenizer that has none. One that writes the date writes 1 January 2026, so that a run
    has the same tokens on every day."""
    max_length: int | None = Field(default=128, ge=2)
    """Tokens; longer rows are cut at the end, and so are rows beyond the base's positions.

    Null: as many as the base and its tokenizer take.
    """
    train_rows: int | None = Field(default=None, ge=1)
    """At most this many training rows, drawn with the seed."""
    eval_rows: int | None = Field(default=None, ge=1)
    """At most this many held-out rows, drawn with the seed."""
    metric: str | None = None
    """The metric of a run on held-out rows; default: accuracy, pearson, f1 (of answers), perplexity, by kind."""

    @model_validator(mode="after")
    def _kind_has_its_columns(self) -> DataSection:
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            choices = ", ".join(METRICS[self.kind])
            raise UserError(f"data.metric {self.metric} is no metric of data.kind {self.kind}; choose from {choices}")
        if self.kind == "pairs" and self.text_pair is None:
            raise UserError("data.kind pairs compares two text columns; name the second as data.text_pair")
        if self.kind == "question_answering" and self.doc_stride >= (self.max_length or 0):
            raise UserError(
                f"data.doc_stride {self.doc_stride} is not below data.max_length {self.max_length}, so parts of a long "
                f"context would not move on; the usual pair is 128 and 384"
            )
        if self.kind in GENERATED:
            prompts = [key for key in ("prompt", "template", "messages") if getattr(self, key) is not None]
            whole_text = self.kind == "causal_lm" and not prompts and self.completion is not None
            if len(prompts) != 1 and not whole_text:
                keys, choices = " and ".join(prompts) or "none", "prompt, template"
                choices += ", messages" if self.kind == "causal_lm" else ""
                raise UserError(f"data.kind {self.kind} takes one of {choices}; given: {keys}")
            if self.completion is not None and prompts == ["messages"]:
                raise UserError("data.completion goes with data.prompt or data.template, not with data.messages")
            if self.template is not None and not template_columns(self.template):
                raise UserError(f"data.template {self.template!r} has no {{column}} place, so all prompts are alike")
        return self

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels: a class, an answer, a completion."""
        if self.kind in GENERATED:
            return self.completion is not None or self.messages is not None
        return self.label is not None or self.kind == "question_answering"


def template_columns(template: str) -> list[str]:
    """Find the columns that a template has places for. Raises ValueError for braces that do not pair."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.template {template!r}: {error}; a brace itself is written twice") from None


class GenerateSection(Section):
    """A test set that the model answers by generated text, in `pedyra eval`.

    A known set (gsm8k, math, humaneval, humanevalplus, mbpp, mbppplus) needs no keys: what is left out is as usual for
    it. A set of any other name is made of the run's own held-out rows.
    """

    source: str | None = None
    """A local file or a Hub id with the columns of the known set; default: the known set's on the Hub."""
    rows: int | None = Field(default=None, ge=1)
    """At most this many rows, drawn with the seed."""
    score: Literal["rouge", "exact", "gsm8k", "math", "code"] | None = None
    """How texts are scored: rouge, exact (equal but for spaces), gsm8k, math, or code, which is run."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens after which a text that has not ended is cut, and counted as unfinished; default: the set's, or 128."""
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    """Texts that end an answer, and are no part of it; an end token always does."""
    beams: int | None = Field(default=None, ge=1)
    """Width of the beam search; 1 is greedy. Default: 4 for an encoder-decoder, else 1."""
    batch_size: int = Field(default=16, ge=1)
    """Texts written at once."""

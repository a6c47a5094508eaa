"""The section `generate` of a recipe: test sets that a model answers in its own words.

Nothing heavy is imported here, as in `pedyra.app.recipe`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pedyra.app.recipe_sections import Section, check_template

Score = Literal["rouge", "exact", "gsm8k", "math", "code"]


class GenerateSection(Section):
    """A test set that the model answers in its own words, and how; `pedyra eval` does it after training.

    A known set (gsm8k, math, humaneval, humanevalplus, mbpp, mbppplus) needs no keys: what is left out is as usual for
    it. One without a source is made of the run's own held-out rows.
    """

    source: str | None = None
    """A local file or a Hub id; default: the known set's on the Hub, else the run's held-out rows."""
    config: str | None = None
    """Configuration of a Hub data set."""
    split: str | None = None
    """Split of a Hub data set; default: test."""
    rows: int | None = Field(default=None, ge=1)
    """At most this many rows, drawn with the seed."""
    template: str | None = None
    """The prompt as text with {column} places; default: the known set's, or that of `data` for held-out rows."""
    chat: bool = False
    """Put the prompt as a user's message, through the tokenizer's chat template."""
    reference: str | None = None
    """Column of the right answer; default: the known set's, or data.completion for held-out rows."""
    score: Score | None = None
    """How texts are judged: rouge, exact (equal but for spaces), gsm8k, math, or code, which is run."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens after which a text that has not ended is cut, and counted as unfinished; default: the set's, or 128."""
    stop: list[str] | None = None
    """Texts that end an answer, and are no part of it; an end token always does."""
    beams: int | None = Field(default=None, ge=1)
    """Beam search over so many; 1 is greedy. Default: 4 for an encoder-decoder, else 1."""
    samples: int = Field(default=1, ge=1)
    """Texts per prompt, for pass@k; more than one need a temperature."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of sampling; 0: no sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling: from the likeliest tokens that hold this much probability."""
    batch_size: int = Field(default=16, ge=1)
    """Texts written at once."""

    @model_validator(mode="after")
    def _one_way_to_search(self) -> GenerateSection:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples is {self.samples}, but all would be equal at temperature 0; set a temperature")
        if (self.beams or 1) > 1 and self.temperature:
            raise ValueError("beams search for the likeliest text and a temperature draws at random; set one of them")
        if self.stop is not None and not all(self.stop):
            raise ValueError("stop holds an empty text, at which every answer would end; remove it")
        check_template(self.template, "template")
        return self

"""An encoder-decoder (BART, T5) makes text of text; ROUGE judges what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pedyra.app.packaged import import_extra
from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.causal_lm import prompts, token_losses
from pedyra.app.tasks.sources import Rows
from pedyra.app.tasks.tokens import num_cut, prompt_text, tell_cut

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def encode(rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase, side: str) -> list[dict[str, list[int]]]:
    """Make input_ids and attention_mask of each source, cut to max_length, and labels, cut to max_target_length.
    Sources alone have none."""
    if not data.labelled:
        return prompts(rows, data, tokenizer)
    sources = [prompt_text(row, data.prompt, data.template) for row in rows]
    targets = [str(row[data.completion or ""]) for row in rows]
    columns = tokenizer(sources, truncation=data.max_length is not None, max_length=data.max_length)
    answers = tokenizer(text_target=targets, truncation=True, max_length=data.max_target_length)
    tell_cut(num_cut(columns), len(rows), side, data.max_length)
    tell_cut(num_cut(answers), len(rows), f"answers of {side}", data.max_target_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": target}
        for ids, mask, target in zip(columns["input_ids"], columns["attention_mask"], answers["input_ids"], strict=True)
    ]


def answer_loss(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Do as `causal_lm.answer_loss` for a decoder whose logits stand at the token that they predict."""
    return token_losses(logits[0] if isinstance(logits, tuple) else logits, labels)


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute mean F of ROUGE-1, -2, -L and -Lsum in per cent, with Porter's stemmer, as papers on XSum do. For Lsum
    each line is a sentence, as in the scripts of transformers; neither side is split into sentences first."""
    scorer = rouge_scorer()
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


def rouge_scorer() -> Any:
    module = import_extra("rouge_score.rouge_scorer", "ROUGE needs rouge-score", "tasks")
    return module.RougeScorer(list(ROUGE), use_stemmer=True)

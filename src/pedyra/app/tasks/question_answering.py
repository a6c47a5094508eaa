"""Questions have a span of a text for an answer, or none: SQuAD v2.0, for any encoder.

A context longer than a model reads is cut into overlapping parts (features). The answer is the best span of all parts,
unless the score of "no answer" beats it. Scores are those of the official script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from pedyra.app.recipe_sections import DataSection
from pedyra.app.tasks.sources import Rows
from pedyra.errors import UserError

BEST, LONGEST = 20, 30  # starts and ends of a part that are paired, and tokens of an answer, as in BERT's own script

LABELS = ["start_positions", "end_positions"]


@dataclass(frozen=True)
class ContextPart:
    """The places of a part's tokens in the context, by which a span of tokens becomes text."""

    row: int
    no_answer: int  # the token that stands for "no answer"
    spans: list[tuple[int, int] | None]  # each token's characters in the context, half open; None outside of it


def encode(
    rows: Rows, data: DataSection, tokenizer: PreTrainedTokenizerBase, side: str
) -> tuple[list[dict[str, Any]], list[ContextPart]]:
    """Make the features of all rows in their order, and per feature its `ContextPart`.

    A feature has the tokenizer's columns, `start_positions` and `end_positions`: the tokens of the first answer, or
    the token for "no answer" where the feature does not hold all of it.
    """
    if not tokenizer.is_fast:
        raise UserError("data.kind question_answering needs a fast tokenizer, which knows each token's characters")
    for number, row in enumerate(rows, start=1):
        _check(row, f"{side} row {number}")
    questions = [str(row["question"]).strip() for row in rows]
    lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    assert data.max_length is not None  # a section of this kind has one
    room = data.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    if lengths and room - max(lengths) <= data.doc_stride:
        longest = lengths.index(max(lengths))
        raise UserError(
            f"{side} row {longest + 1} has a question of {max(lengths)} tokens, which leaves no room for parts that "
            f"overlap by data.doc_stride {data.doc_stride}; raise data.max_length {data.max_length} or lower the stride"
        )
    encoding = tokenizer(
        questions,
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=data.max_length,
        stride=data.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    features, parts = [], []
    for index, row_index in enumerate(encoding.pop("overflow_to_sample_mapping")):
        sequence = encoding.sequence_ids(index)
        offsets = encoding["offset_mapping"][index]
        ids = encoding["input_ids"][index]
        no_answer = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        spans = [tuple(span) if where == 1 else None for span, where in zip(offsets, sequence, strict=True)]
        part = ContextPart(row=row_index, no_answer=no_answer, spans=spans)  # pyright: ignore[reportArgumentType]
        start, end = _positions(part, rows[row_index]["answers"])
        columns = {name: column[index] for name, column in encoding.items() if name != "offset_mapping"}
        features.append({**columns, "start_positions": start, "end_positions": end})
        parts.append(part)
    return features, parts


def _check(row: dict[str, Any], where: str) -> None:
    """Refuse answers that are malformed, or not at their place in the context, because their labels would be wrong."""
    context, answers = row["context"], row["answers"]
    try:
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        right = all(text and start >= 0 and context[start : start + len(text)] == text for text, start in pairs)
    except (TypeError, LookupError, ValueError):
        right = False
    if not right or not isinstance(context, str):
        raise UserError(
            f"{where} has {answers!r:.80} in column 'answers', for {context!r:.40}; answers are {{text: [...], "
            f"answer_start: [...]}}, each text at its place in the context, both empty where there is no answer"
        )


def _positions(part: ContextPart, answers: dict[str, list[Any]]) -> tuple[int, int]:
    """Find the first and last token of the first answer, or twice the token for none."""
    if not answers["text"]:
        return part.no_answer, part.no_answer
    first, last = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    inside = [i for i, span in enumerate(part.spans) if span and span[0] < last and span[1] > first]
    if not inside:
        return part.no_answer, part.no_answer
    start_span, end_span = part.spans[inside[0]], part.spans[inside[-1]]
    assert start_span and end_span
    if start_span[0] > first and _is_edge(part, inside[0], -1) or end_span[1] < last and _is_edge(part, inside[-1], 1):
        return part.no_answer, part.no_answer  # a part of the answer is in another feature
    return inside[0], inside[-1]


def _is_edge(part: ContextPart, token: int, step: int) -> bool:
    """Tell whether the context of this part ends at the token; spaces belong to no token, and do not end it."""
    neighbour = token + step
    return not 0 <= neighbour < len(part.spans) or part.spans[neighbour] is None


def answers_of(start: np.ndarray, end: np.ndarray, parts: Sequence[ContextPart], contexts: Sequence[str]) -> list[str]:
    """Find the answer to each row, empty for "no answer", by scores of every feature's tokens, `(features, length)`."""
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(contexts)
    null = [np.inf] * len(contexts)
    for part, starts, ends in zip(parts, start, end, strict=True):
        null[part.row] = min(null[part.row], float(starts[part.no_answer] + ends[part.no_answer]))
        tokens = np.array([index for index, span in enumerate(part.spans) if span], dtype=int)
        if not len(tokens):
            continue
        firsts = tokens[np.argsort(-starts[tokens], kind="stable")[:BEST], None]
        lasts = tokens[None, np.argsort(-ends[tokens], kind="stable")[:BEST]]
        allowed = (firsts <= lasts) & (lasts < firsts + LONGEST)
        scores = np.where(allowed, starts[firsts] + ends[lasts], -np.inf)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, last] > best[part.row][0]:
            opens, closes = part.spans[int(firsts[first, 0])], part.spans[int(lasts[0, last])]
            assert opens and closes
            best[part.row] = float(scores[first, last]), contexts[part.row][opens[0] : closes[1]].strip()
    return ["" if no_answer > score else text for no_answer, (score, text) in zip(null, best, strict=True)]


def start_and_end(outputs: Any, labels: Any) -> Any:
    """Keep the two scores of each token, without the encoder's states; Trainer's preprocess_logits_for_metrics."""
    return outputs[:2]


def metrics(rows: Rows, parts: Sequence[ContextPart]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make Trainer's compute_metrics for features of `encode`: `squad_scores` of the answers."""
    contexts = [row["context"] for row in rows]
    references = [row["answers"]["text"] for row in rows]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        start, end = (np.asarray(scores) for scores in prediction.predictions)
        return squad_scores(answers_of(start, end, parts, contexts), references)

    return compute


def squad_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute the numbers of SQuAD's official script (evaluate-v2.0.py), in per cent, over all questions, and with
    HasAns_ and NoAns_ over those kinds. An empty text says that there is no answer, and so do no references."""
    exact, f1 = [], []
    for text, accepted in zip(texts, references, strict=True):
        golds = [gold for gold in accepted if normalise(gold)] or [""]
        exact.append(max(float(normalise(gold) == normalise(text)) for gold in golds))
        f1.append(max(token_f1(gold, text) for gold in golds))
    answerable = np.array([bool(accepted) for accepted in references])
    scores: dict[str, float] = {}
    for prefix, rows in (("", np.full(len(texts), True)), ("HasAns_", answerable), ("NoAns_", ~answerable)):
        if rows.any():
            scores[f"{prefix}exact"] = 100.0 * float(np.array(exact)[rows].mean())
            scores[f"{prefix}f1"] = 100.0 * float(np.array(f1)[rows].mean())
            scores[f"{prefix}total"] = int(rows.sum())
    return scores


def normalise(text: str) -> str:
    """Write the text in lower case, without punctuation, the articles a, an, the, and surplus spaces."""
    letters = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def token_f1(reference: str, text: str) -> float:
    """Compute F1 of the words that both have, after `normalise`; 1 where both are empty, 0 where one is."""
    gold, words = normalise(reference).split(), normalise(text).split()
    if not gold or not words:
        return float(gold == words)
    common = sum((Counter(gold) & Counter(words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall)

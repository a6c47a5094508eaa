"""The lines of a shell that load an adapter folder: PEFT needs the class of its task, and the number of labels."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import transformers
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from pedyra.errors import UserError
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
    arguments = "" if labels is None else f", num_labels={labels}"
    return python_line(f"from peft import {auto} as Model", lora.folder, arguments)


def head_line(lora: SavedLora, base: str, labels: int, revision: str | None, out: str) -> str:
    """Write the line of a shell that saves the base as the class of the adapter's head, with so many outputs: a server
    loads a base without a head as another class, which has no place for that of the adapter."""
    arguments = f"num_labels={labels}, ignore_mismatched_sizes=True, dtype='auto'"
    arguments += f", revision={revision!r}" if revision else ""
    model = f"Model.from_pretrained({base!r}, {arguments})"
    code = f"from transformers import {class_name(lora)} as Model; {model}.save_pretrained({out!r})"
    return f"python -c {shlex.quote(code)}"


def class_name(lora: SavedLora) -> str:
    """Name the transformers class of the base: by task type, or the one recorded where the adapter has none. Raises
    ValueError: it says neither."""
    task_type, recorded = lora.config.get("task_type"), lora.config.get("auto_mapping") or {}
    if task_type == "FEATURE_EXTRACTION":
        return "AutoModel"
    name = f"AutoModelFor{TASKS.get(task_type)}" if task_type else str(recorded.get("base_model_class"))
    if not hasattr(getattr(transformers, name, None), "from_pretrained"):
        raise UserError(
            f"{lora.title} does not say which class its base model has; load it with PeftModel.from_pretrained, and "
            f"merge it by merge_and_unload()"
        )
    return name


def python_line(imports: str, folder: Path, arguments: str = "") -> str:
    """Write the line of a shell that loads the folder by Python, with these arguments."""
    return f"python -c {shlex.quote(f'{imports}; model = Model.from_pretrained({json.dumps(str(folder))}{arguments})')}"


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

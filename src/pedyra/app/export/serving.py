"""An exported folder is loaded: here are the commands where no destination was named, as `--for` names one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from pedyra.app.export.destinations import destination
from pedyra.app.export.merge import num_labels
from pedyra.app.export.served import served_by
from pedyra.lora.folder import read_lora

_PEFT = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
"""PEFT loads an adapter of a task_type by this class, any other by AutoPeftModelForCausalLM."""


def serving_lines(folder: Path, target: str) -> list[str]:
    """Write the lines of a shell that load what an export for this target left in `folder`: llama.cpp's for gguf,
    transformers' for merged weights, else PEFT's."""
    if target == "merged":
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        return [_python(f"from transformers import {architectures[0] or 'AutoModel'} as Model", folder)]
    lora = read_lora(folder)
    if target == "gguf":
        return served_by(destination("llama.cpp"), lora, folder)
    task = lora.config.get("task_type")
    by_class = task is None and bool(lora.config.get("auto_mapping"))  # of the base, which PEFT has recorded
    auto = "AutoPeftModel" if by_class else _PEFT.get(str(task), "AutoPeftModelForCausalLM")
    # Without it PEFT makes a head of two.
    labels = num_labels(lora) if by_class or task in ("SEQ_CLS", "TOKEN_CLS") else None
    return [_python(f"from peft import {auto} as Model", folder, "" if labels is None else f", num_labels={labels}")]


def _python(imported: str, folder: Path, given: str = "") -> str:
    """Write a line of a shell that loads the folder by Python, with these arguments."""
    return f"python -c {shlex.quote(f'{imported}; model = Model.from_pretrained({str(folder)!r}{given})')}"

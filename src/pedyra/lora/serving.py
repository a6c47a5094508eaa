"""The line that serves an exported adapter, and what a server of several adapters reserves for them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pedyra.lora.export import RECORD
from pedyra.lora.folder import SavedLora
from pedyra.lora.inspection import read_adapter_config

SERVED_BYTES = 2
"""Of a parameter as vLLM holds it: bfloat16 or float16."""


def vllm_line(base: str, adapters: Mapping[str, Path], rank: int) -> str:
    """The command that serves these adapters, name -> folder, on their base model."""
    modules = " ".join(f"{shlex.quote(name)}={shlex.quote(str(folder))}" for name, folder in adapters.items())
    several = f" --max-loras {len(adapters)}" if len(adapters) > 1 else ""
    return f"vllm serve {shlex.quote(base)} --enable-lora{several} --max-lora-rank {rank} --lora-modules {modules}"


def why_not_in_vllm(config: Mapping[str, Any]) -> str | None:
    """Why vLLM refuses an adapter of this adapter_config.json, in words; None where it takes it."""
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        return f"it serves adapters of language models, and this one has the task_type {config['task_type']}"
    refused = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
    return f"it refuses {' and '.join(refused)}" if refused else None


def serving_lines(folder: Path, target: str) -> list[str]:
    """Lines of a shell that serve what an export for this target has written to `folder`, the usual one first."""
    quoted = shlex.quote(str(folder))
    if target == "merged":
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        if architectures[0].endswith("ForCausalLM"):
            return [f"vllm serve {quoted}"]
        return [_python(f"from transformers import {architectures[0] or 'AutoModel'} as Model", folder)]
    config = read_adapter_config(folder)
    base = config.get("base_model_name_or_path") or "BASE"
    if target == "gguf":
        return [
            f"python convert_lora_to_gguf.py {quoted} --base {shlex.quote(base)} --outfile adapter.gguf",
            "llama-server -m base.gguf --lora adapter.gguf",
        ]
    rank = json.loads((folder / RECORD).read_text(encoding="utf-8"))["vllm"]["max_lora_rank"]
    lines = []
    if rank is not None and why_not_in_vllm(config) is None:
        lines.append(vllm_line(base, {folder.name: folder}, rank))
    kind = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
    kind |= {"TOKEN_CLS": "AutoPeftModelForTokenClassification", "QUESTION_ANS": "AutoPeftModelForQuestionAnswering"}
    name = kind.get(str(config.get("task_type")), "AutoPeftModelForCausalLM")
    return [*lines, _python(f"from peft import {name} as Model", folder)]


def _python(imported: str, folder: Path) -> str:
    """A line of a shell that loads the folder by Python."""
    return f"python -c {shlex.quote(f'{imported}; model = Model.from_pretrained({str(folder)!r})')}"


def reserved_bytes(loras: Sequence[SavedLora], rank: int) -> int:
    """What vLLM reserves for these adapters at once, each padded to one rank, over the layers that any of them has."""
    widths = {}
    for lora in loras:
        for layer in lora.layers:
            A, B = (lora.tensors[layer.keys[slot]] for slot in "AB")
            widths[layer.name] = A.flatten(1).shape[1] + B.flatten(1).shape[0]
    return len(loras) * rank * sum(widths.values()) * SERVED_BYTES

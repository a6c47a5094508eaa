"""An exported folder is served: here it is told whether vLLM takes it, what that reserves, and by which command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from pedyra.app.export.merge import num_labels
from pedyra.lora.folder import SavedLora, read_lora
from pedyra.lora.supported import kinds_of

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM pads every adapter to one of these: vllm/config/lora.py, MaxLoRARanks."""


def vllm_rank(largest: int) -> int | None:
    """Find the `--max-lora-rank` that vLLM needs for this largest rank; None: it takes none so large."""
    return next((limit for limit in VLLM_RANKS if limit >= largest), None)


def vllm_line(base: str, adapters: Mapping[str, Path], rank: int, revision: str | None = None) -> str:
    """Write the command that serves these adapters, name -> folder, on their base model of this revision."""
    which = shlex.quote(base) + (f" --revision {shlex.quote(revision)}" if revision else "")
    modules = " ".join(f"{shlex.quote(name)}={shlex.quote(str(folder))}" for name, folder in adapters.items())
    several = f" --max-loras {len(adapters)}" if len(adapters) > 1 else ""
    return f"vllm serve {which} --enable-lora{several} --max-lora-rank {rank} --lora-modules {modules}"


def why_not_in_vllm(lora: SavedLora) -> str | None:
    """Say why vLLM refuses this adapter; None where it takes it."""
    task, base = lora.config.get("task_type"), _base_class(lora)
    if task not in (None, "CAUSAL_LM") or (task is None and base is not None and not base.endswith(_WRITERS)):
        has = f"has the task_type {task}" if task else f"is of a {base}"
        return f"it serves adapters of language models, and this one {has}"
    scalings = {f"{layer.scaling:.12g}" for layer in lora.layers if layer.scaling}
    if len(scalings) > 1:
        return f"its layers have {len(scalings)} scalings, and it knows one; pedyra export --target peft makes them one"
    refused = refused_by_vllm(lora)
    return f"it refuses {' and '.join(refused)}" if refused else None


_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""The names of transformers' classes that write text end so."""


def _base_class(lora: SavedLora) -> str | None:
    """Return the transformers class of the base, which PEFT records of an adapter without a task_type."""
    return (lora.config.get("auto_mapping") or {}).get("base_model_class")


def refused_by_vllm(lora: SavedLora) -> list[str]:
    """List the kinds of LoRA for which vLLM refuses the adapter: it takes factors, and no other tensor.

    A tensor that no field of the config tells of (PEFT adds the embedding of a resized vocabulary) is named by its key,
    the first of them.
    """
    refused = ("DoRA", "biases", "heads", "trained tokens")
    return [kind.name for kind in kinds_of(lora.config) if kind.name in refused] or lora.others[:1]


def serving_lines(folder: Path, target: str) -> list[str]:
    """Write the lines of a shell that serve what an export for this target left in `folder`, the usual one first."""
    quoted = shlex.quote(str(folder))
    if target == "merged":
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        if architectures[0].endswith("ForCausalLM"):
            return [f"vllm serve {quoted}"]
        return [_python(f"from transformers import {architectures[0] or 'AutoModel'} as Model", folder)]
    lora = read_lora(folder)
    config = lora.config
    base = config.get("base_model_name_or_path") or "BASE"
    if target == "gguf":
        # --base takes a folder; a repository on the Hub has an option of its own.
        here = base == "BASE" or base.startswith((".", "/", "~")) or Path(base).exists()
        option = "--base" if here else "--base-model-id"
        return [
            f"python convert_lora_to_gguf.py {quoted} {option} {shlex.quote(base)} --outfile adapter.gguf",
            "llama-server -m base.gguf --lora adapter.gguf",
        ]
    rank = vllm_rank(max(layer.rank for layer in lora.layers))
    lines = []
    if rank is not None and why_not_in_vllm(lora) is None:
        lines.append(vllm_line(base, {folder.name: folder}, rank, config.get("revision")))
    kind = {"SEQ_CLS": "AutoPeftModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}
    kind |= {"TOKEN_CLS": "AutoPeftModelForTokenClassification", "QUESTION_ANS": "AutoPeftModelForQuestionAnswering"}
    kind |= {"FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction"}
    task = str(config.get("task_type"))
    by_class = config.get("task_type") is None and _base_class(lora) is not None
    auto = "AutoPeftModel" if by_class else kind.get(task, "AutoPeftModelForCausalLM")
    # Without it PEFT makes a head of two.
    labels = num_labels(lora) if by_class or task in ("SEQ_CLS", "TOKEN_CLS") else None
    given = "" if labels is None else f", num_labels={labels}"
    return [*lines, _python(f"from peft import {auto} as Model", folder, given)]


def _python(imported: str, folder: Path, given: str = "") -> str:
    """Write a line of a shell that loads the folder by Python, with these arguments."""
    return f"python -c {shlex.quote(f'{imported}; model = Model.from_pretrained({str(folder)!r}{given})')}"

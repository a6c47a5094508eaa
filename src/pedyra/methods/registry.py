"""Every method by name, in the order of a table. Listing them imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pedyra.methods.method import Adaptation, Method, Prepare
from pedyra.recipe import Recipe


def _in(module: str, function: str = "prepare") -> Prepare:
    """`function` of pedyra.methods.<module>, imported when it is first called."""

    def prepare(*args: Any, **kwargs: Any) -> Adaptation:
        return getattr(import_module(f"pedyra.methods.{module}"), function)(*args, **kwargs)

    return prepare


def _with_nf4(recipe: Recipe) -> Recipe:
    """QLoRA's weights are nf4 unless the recipe asks for int8."""
    if recipe.model.quantization != "none":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA (Hu et al. 2021)", _in("delegated", "prepare_lora"), takes_ranks=True),
        Method("lora+", "LoRA whose B learns faster than its A (Hayou et al. 2024)", _in("loraplus"), takes_ranks=True),
        Method(
            "pissa",
            "LoRA from the weight's top triples (Meng et al. 2024)",
            _in("delegated", "prepare_pissa"),
            takes_ranks=True,
        ),
        Method(
            "dora",
            "LoRA of a direction, with its magnitude (Liu et al. 2024)",
            _in("delegated", "prepare_dora"),
            takes_ranks=True,
        ),
        Method(
            "qlora",
            "LoRA over weights in 4 bits (Dettmers et al. 2023)",
            _in("delegated", "prepare_qlora"),
            resolve=_with_nf4,
            takes_ranks=True,
        ),
        Method("randlora", "full-rank from scaled random bases (Albert et al. 2025)", _in("randlora")),
        Method("eva", "LoRA with ranks and A from the inputs (Paischer et al. 2024)", _in("eva")),
        Method("gora", "LoRA with ranks and start from the gradient (He et al. 2025)", _in("gora")),
        Method("para", "LoRA of higher rank, cut after training at one threshold (2026)", _in("para")),
        Method(
            "adalora",
            "AdaLoRA (Zhang et al. 2023), PEFT's own: masked ranks",
            _in("adalora"),
            resumable=False,
        ),
        Method("adalora-svd", "AdaLoRA with ranks that are removed", _in("adalora_svd")),
        Method(
            "increlora",
            "grows by the update's sensitivity (Zhang F. et al. 2023)",
            _in("increlora"),
        ),
        Method(
            "triadaptlora",
            "grows where a core's norm rises (Liang et al. 2025)",
            _in("triadaptlora"),
        ),
        Method("elalora", "moves by each layer's weakest triples (Chang et al. 2025)", _in("elalora")),
        Method("l1ra", "gates under an L1 penalty; closed ones move (Singh et al. 2025)", _in("l1ra")),
        Method("dylora", "nested ranks, trained at once (Valipour et al. 2023)", _in("dylora")),
        Method("rasa", "ranks shared by all layers of a type (He et al. 2025)", _in("rasa")),
        Method("sora", "gates that proximal steps close (Ding et al. 2023)", _in("sora")),
        Method("autolora", "ranks from a bilevel search, then LoRA (Zhang R. et al. 2024)", _in("autolora")),
        Method("prune", "PE-DyRA's scores, pruning only (Table 5)", _in("prune")),
        Method("expand", "PE-DyRA's scores, expansion only (Table 5)", _in("expand")),
        Method("random", "PE-DyRA's moves, at random (Fig. 4a)", _in("random_moves")),
        Method("mask", "PE-DyRA's scores, lowest ranks masked to zero (Fig. 8)", _in("mask")),
        Method("pedyra-paper", "PE-DyRA as the paper has it", _in("pedyra.method")),
        Method("pedyra", "PE-DyRA with our defaults", _in("pedyra.method")),
    )
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name.lower(), METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
    raise ValueError(f"method {name!r} is unknown; {hint}")


def check_ranks(recipe: Recipe) -> None:
    """Raise ValueError if the recipe gives ranks by layer to a method that does not keep them, with those that do."""
    if recipe.lora.ranks is not None and not get_method(recipe.method).takes_ranks:
        fitting = ", ".join(name for name, method in METHODS.items() if method.takes_ranks)
        raise ValueError(
            f"lora.ranks gives each layer its rank, but method {recipe.method} decides on ranks itself; "
            f"add method=lora (or one of {fitting}), or remove lora.ranks"
        )

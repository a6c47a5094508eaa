"""A recipe with what its method presupposes filled in. No torch is loaded."""

from __future__ import annotations

from pedyra.app.recipe import Recipe
from pedyra.methods.registry import check_ranks, get_method


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its method's quantization (qlora: nf4) where it names none.

    Raises:
        ValueError: an unknown method, or `lora.ranks` with one that does not keep them.
    """
    method = get_method(recipe.method)
    if recipe.lora.ranks is not None:
        check_ranks(recipe.method)
    if method.quantization is None or recipe.model.quantization != "none":
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": method.quantization})})

"""Which layers of a model a recipe's `lora.ranks` names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pedyra.lora.spelling import did_you_mean


def layer_ranks(model: nn.Module, wanted: Mapping[str, int] | None) -> dict[str, int] | None:
    """Full layer name -> rank, in the model's order, without the layers that get none. None: every layer gets lora.r.

    Args:
        wanted: full name or its last parts, as in target_modules -> rank; the longest key counts.

    Raises:
        ValueError: a key that names no layer, with the nearest that there is.
    """
    if wanted is None:
        return None
    names = [name for name, module in model.named_modules() if _has_matrix(module)]
    for key in wanted:
        if not any(_is_called(name, key) for name in names):
            kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            hint = did_you_mean(key, [*names, *kinds], otherwise=f"layers are called {', '.join(kinds)}")
            raise ValueError(f"lora.ranks: {key!r} is no layer of the model; {hint}")
    found: dict[str, int] = {}
    for name in names:
        keys = [key for key in wanted if _is_called(name, key)]
        if keys and wanted[max(keys, key=len)]:
            found[name] = wanted[max(keys, key=len)]
    return found


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _is_called(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)

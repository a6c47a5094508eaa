"""The LoRA of a recipe: PEFT's LoraConfig, the layers that `lora.ranks` names, and names that match nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor, nn

from pedyra.app.models.base import task_type
from pedyra.app.recipe_sections import LoraSection
from pedyra.lora.layer_names import check_patterns, pattern_keys
from pedyra.lora.spelling import did_you_mean


def lora_config(section: LoraSection, kind: str, ranks: Mapping[str, int] | None = None) -> LoraConfig:
    """PEFT's LoraConfig; the task type follows from the kind of data, so that a new head is trained and saved.

    Args:
        ranks: `layer_ranks` of the section's: these layers are adapted, all with the scaling alpha / r.
    """
    keys = pattern_keys(ranks or {})
    scaling = section.alpha / section.r
    return LoraConfig(
        task_type=task_type(kind),
        r=section.r,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType] (PEFT takes fractions too)
        lora_dropout=section.dropout,
        target_modules=section.target_modules if ranks is None else list(ranks),
        exclude_modules=_excluded(section, kind) if ranks is None else None,
        rank_pattern={keys[name]: rank for name, rank in (ranks or {}).items()},
        alpha_pattern={keys[name]: rank * scaling for name, rank in (ranks or {}).items()},  # pyright: ignore[reportArgumentType]
        init_lora_weights=section.init,  # pyright: ignore[reportArgumentType] (PEFT checks the name)
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        bias=section.bias,
        modules_to_save=section.modules_to_save,
    )


def _excluded(section: LoraSection, kind: str) -> str | list[str] | None:
    """PEFT's all-linear leaves every head out but the one for answers, which is trained in full beside the adapter."""
    given = section.exclude_modules
    if kind != "question_answering" or section.target_modules != "all-linear" or isinstance(given, str):
        return given
    return [*(given or ()), "qa_outputs"]


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
    longest = {name: max((key for key in wanted if _is_called(name, key)), key=len, default=None) for name in names}
    return {name: wanted[key] for name, key in longest.items() if key is not None and wanted[key]}


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def check_names(model: nn.Module, section: LoraSection) -> None:
    """Refuse target modules, excluded ones, and modules to save, of which any matches nothing; PEFT overlooks them.

    Raises:
        ValueError: with the names that could have been meant.
    """
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(section, key)
        if given is None or given == "all-linear":
            continue
        if isinstance(given, str):
            try:
                check_patterns([given], names)
            except ValueError as error:
                raise ValueError(f"lora.{key}: {error}") from None
            unmatched = [] if any(re.fullmatch(given, name) for name in names) else [given]
        else:
            unmatched = [wanted for wanted in given if not any(_is_called(name, wanted) for name in names)]
        if unmatched:
            linear = [
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
            ]
            raise ValueError(
                f"lora.{key}: {unmatched[0]!r} matches no module of the model; "
                f"candidates: {', '.join(dict.fromkeys(linear))}"
            )


def _is_called(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)

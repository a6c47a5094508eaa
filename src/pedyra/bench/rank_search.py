"""`pedyra search`: ranks for plain LoRA, read off a short and wide run of the same recipe.

A LoRA of several times the rank is trained for a part of the run. The singular values of each layer's update then say
how many directions it has used; the ranks of all layers are chosen together, so that the truncated update loses least
at the parameters of the recipe's uniform rank (Eckart-Young, per parameter).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pedyra.files import write_file
from pedyra.lora.folder import read_lora
from pedyra.lora.layer_names import pattern_keys
from pedyra.methods.registry import get_method
from pedyra.recipe import Recipe, check_recipe
from pedyra.runs.run import plan_run, train_run
from pedyra.runs.run_folder import RunFolder


@dataclass(frozen=True)
class FoundRanks:
    """Ranks per layer at the budget of a uniform rank."""

    ranks: dict[str, int]
    costs: dict[str, int]
    """Parameters of one rank of each layer."""
    uniform: int
    """The recipe's rank."""
    scaling: float
    """alpha / r of the recipe, and of every layer."""

    @property
    def parameters(self) -> int:
        return sum(self.costs[name] * rank for name, rank in self.ranks.items())

    @property
    def budget(self) -> int:
        """Parameters of the uniform rank."""
        return self.uniform * sum(self.costs.values())

    def lora_arguments(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`; layers of rank 0 are no targets."""
        present = {name: rank for name, rank in self.ranks.items() if rank}
        keys = pattern_keys(present)
        return {
            "r": self.uniform,
            "lora_alpha": self.uniform * self.scaling,
            "target_modules": list(present),
            "rank_pattern": {keys[name]: rank for name, rank in present.items()},
            "alpha_pattern": {keys[name]: rank * self.scaling for name, rank in present.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, then the total, as `pedyra inspect` has them."""
        layers = [
            {"layer": name, "rank": rank, "parameters": rank * self.costs[name]} for name, rank in self.ranks.items()
        ]
        return [*layers, {"layer": "total", "rank": sum(self.ranks.values()), "parameters": self.parameters}]


def search_ranks(
    recipe: Recipe, *, part: float = 0.1, widen: int = 4, min_rank: int = 0, overwrite: bool, console: Console
) -> FoundRanks:
    """Train the short wide run into `<output_dir>-search`, and choose ranks from its adapter.

    Args:
        part: of the recipe's steps, in (0, 1].
        widen: times the recipe's rank.
        min_rank: no layer gets less.
        overwrite: replace an earlier search.

    Raises:
        ValueError: a setting outside its range, an earlier search, a recipe that `pedyra train` would refuse.
        KeyboardInterrupt: the run was interrupted.
    """
    get_method(recipe.method)
    if not 0 < part <= 1:
        raise ValueError(f"--part is {part}; it is a part of the run, above 0 and at most 1")
    if widen < 2:
        raise ValueError(
            f"--widen is {widen}; at a width of 1 no layer can show more ranks than it has: take 2 or more"
        )
    if not 0 <= min_rank <= recipe.lora.r:
        raise ValueError(f"--min-rank is {min_rank}; it lies between 0 and lora.r, {recipe.lora.r}")
    folder = RunFolder(Path(f"{recipe.output_dir}-search"))
    if folder.holds_run() and not overwrite:
        raise ValueError(f"{folder.path} holds an earlier search; replace it with --overwrite, or change output_dir")
    steps = max(1, round(part * plan_run(wide_recipe(recipe, widen), overwrite=overwrite).total_steps))
    result = train_run(wide_recipe(recipe, widen, steps), overwrite=overwrite, console=console)
    if result.interrupted:
        raise KeyboardInterrupt
    saved = read_lora(result.folder.path)
    factors = {
        layer.name: (layer.scaling * saved.tensors[layer.keys["B"]], saved.tensors[layer.keys["A"]])
        for layer in saved.layers
    }
    return choose_ranks(factors, recipe.lora.r, min_rank=min_rank, scaling=recipe.lora.alpha / recipe.lora.r)


def wide_recipe(recipe: Recipe, widen: int, steps: int | None = None) -> Recipe:
    """The recipe of the search run: plain LoRA from PEFT's start, alpha / r as before, nothing saved on the way."""
    if recipe.lora.use_rslora:
        raise ValueError("lora.use_rslora makes the scaling depend on the rank, which differs by layer; turn it off")
    content = recipe.model_dump()
    content |= {"method": "lora", "method_settings": {}, "rank": {}, "output_dir": f"{recipe.output_dir}-search"}
    content["lora"] |= {"r": widen * recipe.lora.r, "alpha": widen * recipe.lora.alpha}
    content["lora"] |= {"ranks": None, "init": True, "use_dora": False}
    content["training"] |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    if steps is not None:
        content["training"]["max_steps"] = steps
    return check_recipe(content, recipe.name)


def choose_ranks(
    factors: Mapping[str, tuple[Tensor, Tensor]], uniform: int, *, min_rank: int = 0, scaling: float = 1.0
) -> FoundRanks:
    """Ranks from updates B A given as (B `(out, r)`, A `(r, in)`), at the parameters of the rank `uniform`."""
    costs = {name: B.shape[0] + A.shape[1] for name, (B, A) in factors.items()}
    gains = {name: singular_values(B, A).square().tolist() for name, (B, A) in factors.items()}
    return FoundRanks(by_gain(costs, uniform, gains, min_rank), costs, uniform, scaling)


def by_gain(
    costs: Mapping[str, int], rank: int, gains: Mapping[str, Sequence[float]], min_rank: int = 0
) -> dict[str, int]:
    """The budget of a uniform `rank` for what has the highest gain per parameter."""
    candidates = sorted(
        (-gain / costs[name], position, index, name)
        for position, name in enumerate(costs)
        for index, gain in enumerate(gains[name][min_rank:])
    )
    ranks, left = dict.fromkeys(costs, min_rank), (rank - min_rank) * sum(costs.values())
    for *_, name in candidates:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of B A `(min(r, in, out),)`, highest first, without forming the product."""
    upper_B, upper_A = torch.linalg.qr(B.float()).R, torch.linalg.qr(A.float().T).R
    return torch.linalg.svdvals(upper_B @ upper_A.T)


def write_lora_arguments(found: FoundRanks, path: Path) -> None:
    """`LoraConfig(**json.load(open(path)))` is a LoRA of these ranks."""
    write_file(path, json.dumps(found.lora_arguments(), indent=2) + "\n")

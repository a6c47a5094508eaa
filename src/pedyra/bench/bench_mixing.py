"""What Algorithm 1, step 3, decides on a real run: does the mixture of the two scores listen to both?

At every adjustment of one run of PE-DyRA the two scores of all triples are taken apart, and the k lowest triples of
several mixtures of them are compared with the k lowest of either alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pedyra.allocate.allocation import Scores, lowest, prunable
from pedyra.allocate.callback import RankCallback
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.scores import TripleScores
from pedyra.methods.registry import get_method
from pedyra.recipe import Recipe, check_recipe
from pedyra.runs.plan import make_plan
from pedyra.runs.setup import set_up

MIXTURES = (("none", 0.1), ("none", 0.5), ("none", 0.9), ("none", 0.999), ("mean", 0.5), ("rank", 0.5))
"""(score_norm, alpha): "none" is the paper's sum, as it is written."""

COLUMNS = {
    "step": "step",
    "score_norm": "score_norm",
    "alpha": "alpha",
    "ratio": "S_inp / S_grad",
    "with_inputs": "also lowest by S_inp",
    "with_gradient": "also lowest by S_grad",
    "each_other": "lowest by both",
    "by_chance": "by chance",
}


def bench_mixing(recipe: Recipe) -> list[dict[str, Any]]:
    """One row per adjustment and mixture of a run of the recipe.

    `ratio` is the mean input score by the mean gradient score over all triples; the others are parts, 0 to 1, of the k
    triples that would be pruned: of those by the mixture, how many are among the k of the input score alone, of the
    gradient score alone; how many these two share; and k by the number of triples, which chance would give.

    Raises:
        ValueError: a recipe whose method does not mix the two scores, or that `pedyra train` would refuse.
    """
    if recipe.method not in ("pedyra", "pedyra-paper"):
        raise ValueError(f"method is {recipe.method!r}; only pedyra and pedyra-paper mix these two scores")
    config = get_method(recipe.method).resolve(recipe).rank_config()
    if config.score != "importance" or not 0 < (config.alpha or 0) < 1 or config.prune != "score":
        raise ValueError(
            f"rank.prune is {config.prune!r}, rank.score {config.score!r}, rank.alpha {config.alpha}; to look at the "
            f"mixture take method=pedyra-paper, whose scores decide what is pruned, and an alpha between 0 and 1"
        )
    with tempfile.TemporaryDirectory() as folder:
        content: dict[str, Any] = recipe.model_dump() | {"output_dir": folder}
        content["training"] |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        setup = set_up(check_recipe(content, recipe.name))
        make_plan(setup)
        assert setup.ranks is not None
        mixing = Mixing(setup.ranks)
        setup.trainer(folder, [*setup.adaptation.callbacks, mixing]).train()
    return mixing.rows


class Mixing(TrainerCallback):
    """Collects the rows, just before each adjustment of the callback it is given."""

    def __init__(self, ranks: RankCallback) -> None:
        self.ranks = ranks
        self.rows: list[dict[str, Any]] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        allocator = self.ranks.allocator
        assert allocator is not None
        if allocator.schedule.is_adjustment(allocator.step + 1):
            self.rows += compare_mixtures(allocator)


def compare_mixtures(
    allocator: RankAllocator, mixtures: Sequence[tuple[str, float]] = MIXTURES
) -> list[dict[str, Any]]:
    """The rows of one adjustment, from the gradients and inputs observed up to now; see `bench_mixing`."""
    config, source = allocator.config, allocator.scores
    assert isinstance(source, TripleScores)

    def scores(norm: str, alpha: float) -> Scores:
        return source.triple_scores(alpha=alpha, score_norm=norm, input_norm=config.input_norm, omega=config.omega)

    def chosen(norm: str, alpha: float) -> set[tuple[str, int]]:
        pruned = lowest(prunable(scores(norm, alpha), config.min_rank), allocator.moves)
        return {(name, index) for name, indices in pruned.items() for index in indices}

    gradient, inputs = chosen("none", 1.0), chosen("none", 0.0)
    sums = [sum(map(sum, scores("none", alpha).values())) for alpha in (0.0, 1.0)]
    shared = {
        "step": allocator.step + 1,
        "ratio": sums[0] / sums[1] if sums[1] else math.inf,
        "each_other": _part(gradient, inputs),
        "by_chance": allocator.moves / sum(allocator.ranks.values()),
    }
    rows = []
    for norm, alpha in mixtures:
        mixed = chosen(norm, alpha)
        rows.append(
            {**shared, "score_norm": norm, "alpha": alpha}
            | {"with_inputs": _part(mixed, inputs), "with_gradient": _part(mixed, gradient)}
        )
    return rows


def _part(of: set[tuple[str, int]], among: set[tuple[str, int]]) -> float:
    return len(of & among) / max(1, len(of))

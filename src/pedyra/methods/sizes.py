"""Methods that end at another size than they begin with: down to an average rank (`Shrinking`), or up to one
(`Growing`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pedyra.allocate.allocation import RankPlan, Scores, cost, layer_means, lowest_to_free, make_plan
from pedyra.allocate.contract import Beginning, Training, Work
from pedyra.allocate.schedule import check_count
from pedyra.allocate.scored import ScoredMethod, ScoredSituation
from pedyra.errors import UserError
from pedyra.methods.slots import plain_ranks


@dataclass(frozen=True, kw_only=True)
class Shrinking(ScoredMethod):
    """Ranks are pruned from the LoRA's r down to `final_rank`, those of the lowest scores of all layers first."""

    final_rank: int | None = None
    """Average rank at the end. None: two thirds of the LoRA's r."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.final_rank is not None:
            check_count("final_rank", self.final_rank, 1)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        check_shrinks(self.final_rank, plain_ranks(model, adapter))
        return super().install(model, adapter)

    def prune(self, left: float, scores: Scores, now: ScoredSituation) -> RankPlan:
        """Prune the lowest scores, per unit of the budget, until this part of all that is to go is left."""
        first = cost(now.initial_ranks, now.units)
        last = final_rank(self.final_rank, [*now.initial_ranks.values()]) * sum(now.units.values())
        excess = cost(now.ranks, now.units) - int(last + (first - last) * left)
        per_unit = {name: [value / now.units[name] for value in values] for name, values in scores.items()}
        return make_plan(scores, lowest_to_free(per_unit, now.units, excess, now.min_rank), {}, layer_means(scores))


def final_rank(value: int | None, ranks: Sequence[int]) -> int:
    """Return the final rank of a run that begins with these: by default two thirds of their mean, and 1 at least."""
    return max(1, round(sum(ranks) / len(ranks) / 1.5)) if value is None else value


def check_shrinks(value: int | None, ranks: Sequence[int]) -> None:
    """Raise ValueError unless a LoRA of these ranks, where it begins, is above its final rank."""
    if ranks and (mean := sum(ranks) / len(ranks)) <= (final := final_rank(value, ranks)):
        raise UserError(
            f"the LoRA begins at rank {mean:g}, but ranks are pruned from it down to final_rank {final}; give it r="
            f"{max(final + 1, round(1.5 * final))}, or lower final_rank"
        )


def check_grows(final: int, ranks: Sequence[int]) -> None:
    """Raise ValueError unless a LoRA of these ranks, where it begins, is below its final rank."""
    if ranks and max(ranks) >= final:
        raise UserError(
            f"the LoRA begins at rank {max(ranks)}, but layers grow from it up to final_rank {final}; give it a lower "
            f"r (the authors begin at 1), or raise final_rank"
        )


@dataclass(frozen=True, kw_only=True)
class Growing(ScoredMethod):
    """The total grows from the LoRA's r, which is 1 with the authors, to layers x `final_rank` ranks: at an adjustment
    the layers of the highest scores gain final_rank / 2 each."""

    final_rank: int = 8
    """Average rank at the end."""

    prunes = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_count("final_rank", self.final_rank, 2)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        check_grows(self.final_rank, plain_ranks(model, adapter))
        return super().install(model, adapter)

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        if rank < 2:
            raise UserError("a method that begins at rank 1 and grows cannot have the size of a LoRA of r = 1; raise r")
        return Beginning(1, {"final_rank": rank})  # where the scaling is alpha / rank

    @property
    def add(self) -> int:
        """Ranks that a growing layer gains."""
        return self.final_rank // 2


def growth(
    layer_scores: Mapping[str, float], active: Mapping[str, int], missing: int, top: int, add: int
) -> dict[str, int]:
    """Return layer -> ranks it gains: `add` for each of the `top` highest, ties in layer order, never more than
    `missing` in all."""
    best = sorted(active, key=lambda name: -layer_scores[name])[:top]
    gains = {name: min(add, missing - place * add) for place, name in enumerate(best)}
    return {name: gain for name, gain in gains.items() if gain > 0}

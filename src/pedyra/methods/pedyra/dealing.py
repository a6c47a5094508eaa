"""The one adjustment at which all ranks are dealt anew, by what the triples save of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, deal_ranks, largest_growth, layer_means, make_plan
from pedyra.allocate.optimizer_checks import has_second_moments, no_second_moments
from pedyra.allocate.optimizer_state import removal_losses
from pedyra.allocate.rule import Situation
from pedyra.allocate.schedule import Schedule
from pedyra.config import RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.turning import shared, turn_layer, turns_of

MOST = 2.5
"""Nothing is dealt where some layer would get more than so many times its rank: its triples have then learned first, as
those beside a new head do, and what the others will save is not known yet (docs/evidence.md). Two layers of one size
have 2 at most, so with few of them the bound is (layers + 1) / 2."""

USUAL = 0.1
"""`Settings.reassignment` where it is not given."""


def deal_step(
    layers: Sequence[AdaptedLayer],
    optimizer: Optimizer,
    settings: Settings,
    config: RankConfig,
    schedule: Schedule,
    *,
    after: int = 0,
) -> int | None:
    """The adjustment after step `after` nearest to `settings.reassignment`, of two the earlier; None where none deals.

    None does where a triple holds something before the first step: its loss would be that of what it began with. Nor by
    default with an optimizer without second moments.

    Raises:
        ValueError: `settings.reassignment` is given, and the optimizer has no second moments.
    """
    nearest = adjustment_of_deal(settings, config, schedule, after=after)
    if nearest is None:
        return None
    if after == 0 and any(layer.b.weight.any() for layer in layers):
        return None
    parameters = [layer.a.A for layer in layers]
    if not has_second_moments(optimizer, parameters):
        if settings.reassignment is None:
            return None
        raise no_second_moments(optimizer, f"method_settings.reassignment is {settings.reassignment}", "leave it out")
    return nearest


def adjustment_of_deal(settings: Settings, config: RankConfig, schedule: Schedule, *, after: int = 0) -> int | None:
    """What `deal_step` is by the schedule alone, whatever layers and optimizer."""
    wanted = USUAL if settings.reassignment is None else settings.reassignment
    coming = [step for step in schedule.adjustments if step > after]
    if not wanted or config.moves == 0 or not coming:
        return None
    at = wanted * schedule.total_steps if isinstance(wanted, float) else wanted
    return min(coming, key=lambda step: abs(step - at))


def deal(
    layers: Sequence[AdaptedLayer], optimizer: Optimizer, now: Situation
) -> tuple[dict[str, list[float]], RankPlan]:
    """`deal_ranks` at the budget in force, and the losses it went by; layers that shrink are turned first.

    The plan changes nothing where some layer would get more than MOST times its rank.

    A layer's loss is that of all its triples, as they are. Once turned, they share it by the squares of their lengths,
    so the weakest directions go, and not the rows that happen to hold least.
    """
    losses = removal_losses(layers, optimizer)
    turns = {}
    if all(layer.a.unit for layer in layers):
        turns = turns_of(layers, now.ranks)
        losses = {name: shared(sum(values), turns[name].lengths) for name, values in losses.items()}
    unit = now.budget == "ranks"
    costs: Mapping[str, int] = dict.fromkeys(now.costs, 1) if unit else now.costs
    if largest_growth(losses, costs) > min(MOST, (len(layers) + 1) / 2):
        return losses, make_plan(losses, {}, {}, layer_means(losses, {}))
    plan = deal_ranks(
        losses, min_rank=now.min_rank, max_ranks=now.max_ranks, costs=costs, spare=0 if unit else now.spare
    )
    for layer in layers:
        if layer.name in plan.pruned and turns:
            turn_layer(layer, optimizer, turns[layer.name].W)
    return losses, plan

"""The one adjustment at which all ranks are assigned anew, by what the triples save of the loss."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan
from pedyra.allocate.contract import Situation
from pedyra.allocate.optimizer_checks import has_second_moments, no_second_moments
from pedyra.allocate.schedule import Schedule
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.turning import shared, turn_layer, turns_of

MOST = 2.5
"""No rank is assigned anew where some layer would get more than so many times its rank: its triples then have learned
first, as those beside a new head do, and what the others will save is not known yet (docs/results.md). Two layers of
one size have 2 at most, so with few of them the bound is (layers + 1) / 2."""

USUAL = 0.1
"""`Settings.reassignment` where it is not given."""


def reassignment_step(
    layers: Sequence[AdaptedLayer],
    optimizer: Optimizer,
    settings: Settings,
    config: RankConfig,
    schedule: Schedule,
    *,
    after: int = 0,
) -> int | None:
    """The adjustment after step `after` nearest to `settings.reassignment`, of two the earlier; None: there is none.

    None does where a triple holds something before the first step: its loss would be that of what it began with. Nor by
    default with an optimizer without second moments.

    Raises:
        ValueError: `settings.reassignment` is given, and the optimizer has no second moments.
    """
    nearest = adjustment_of_reassignment(settings, config, schedule, after=after)
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


def adjustment_of_reassignment(
    settings: Settings, config: RankConfig, schedule: Schedule, *, after: int = 0
) -> int | None:
    """What `reassignment_step` is by the schedule alone, whatever layers and optimizer."""
    wanted = USUAL if settings.reassignment is None else settings.reassignment
    coming = [step for step in schedule.adjustments if step > after]
    if not wanted or config.moves == 0 or not coming:
        return None
    at = wanted * schedule.total_steps if isinstance(wanted, float) else wanted
    return min(coming, key=lambda step: abs(step - at))


def reassign(
    layers: Sequence[AdaptedLayer], optimizer: Optimizer, now: Situation
) -> tuple[dict[str, list[float]], RankPlan]:
    """`proportional_ranks` at the budget in force, and the losses it went by; layers that shrink are turned first.

    The plan changes nothing where some layer would get more than MOST times its rank.

    A layer's loss is that of all its triples, as they are. Once turned, they share it by the squares of their lengths,
    so the weakest directions go, and not the rows that happen to hold least.
    """
    losses = removal_losses(layers, optimizer)
    turns = {}
    if all(layer.a.e_fixed_at_one for layer in layers):
        turns = turns_of(layers, now.ranks)
        losses = {name: shared(sum(values), turns[name].lengths) for name, values in losses.items()}
    costs = now.prices
    if largest_growth(losses, costs) > min(MOST, (len(layers) + 1) / 2):
        return losses, make_plan(losses, {}, {}, layer_means(losses, {}))
    plan = proportional_ranks(losses, min_rank=now.min_rank, max_ranks=now.max_ranks, costs=costs, spare=now.unspent)
    for layer in layers:
        if layer.name in plan.pruned and turns:
            turn_layer(layer, optimizer, turns[layer.name].W)
    return losses, plan


def proportional_ranks(
    losses: Scores, *, min_rank: int, max_ranks: Mapping[str, int], costs: Mapping[str, int], spare: int
) -> RankPlan:
    """Ranks in proportion to what a layer's triples save of the loss per unit of cost.

    If r triples of a layer save a log r, the next one saves a / r, and a budget buys most where a / (r cost) is the
    same in every layer. a is taken to be what removing the layer's triples one by one would cost. Ranks become whole
    numbers by Webster's method: one after the other to the layer where a / ((r + 1/2) cost) is largest, of those that
    can be paid for. A layer that shrinks loses its lowest. Nothing changes where no triple saves anything, or what one
    saves is not finite.

    Args:
        losses: what removing each triple costs.
        costs: units of one triple of each layer.
        spare: units that nothing uses.
    """
    totals = {name: sum(values) for name, values in losses.items()}
    if not any(totals.values()) or not all(map(math.isfinite, totals.values())):
        return make_plan(losses, {}, {}, layer_means(losses, {}))
    left = spare + sum(costs[name] * len(values) for name, values in losses.items())
    ranks = {name: min(min_rank, len(values)) for name, values in losses.items()}
    left -= sum(costs[name] * rank for name, rank in ranks.items())

    def claim(position: int, name: str) -> tuple[float, int, str]:
        return -totals[name] / ((ranks[name] + 0.5) * costs[name]), position, name

    queue = [claim(position, name) for position, name in enumerate(ranks)]
    heapq.heapify(queue)
    while queue:
        _, position, name = heapq.heappop(queue)
        if ranks[name] < max_ranks[name] and costs[name] <= left:  # else never again: less and less is left
            ranks[name] += 1
            left -= costs[name]
            heapq.heappush(queue, claim(position, name))
    pruned, added = {}, {}
    for name, values in losses.items():
        if ranks[name] < len(values):
            order = sorted(range(len(values)), key=lambda i: (values[i], i))
            pruned[name] = tuple(sorted(order[: len(values) - ranks[name]]))
        elif ranks[name] > len(values):
            added[name] = ranks[name] - len(values)
    return make_plan(losses, pruned, added, layer_means(losses, {}))


def largest_growth(losses: Scores, costs: Mapping[str, int]) -> float:
    """How many times its rank the layer that gains most would get, before rounding; 0 where nothing is known.

    A layer without triples gets none and does not count.
    """
    present = {name: values for name, values in losses.items() if len(values)}
    total = sum(sum(values) for values in present.values())
    if not total > 0 or not math.isfinite(total):
        return 0.0
    budget = sum(costs[name] * len(values) for name, values in present.items())
    # r_l proportional to loss / cost, and the sum of r_l cost is the budget.
    return max(budget * sum(values) / (total * costs[name] * len(values)) for name, values in present.items())


@torch.no_grad()
def removal_losses(layers: Sequence[AdaptedLayer], optimizer: Optimizer) -> dict[str, list[float]]:
    """What pruning each triple costs, `removal_loss` of its E where that is trained, else of its row of A.

    0 where the optimizer has not seen a parameter yet. One transfer to the host.
    """
    losses = []
    for layer in layers:
        weight = layer.a.E[:, None] if layer.a.E.requires_grad else layer.a.A
        state = optimizer.state.get(layer.a.E if layer.a.E.requires_grad else layer.a.A, {})
        moment = state.get("exp_avg_sq", state.get("state2"))
        moment = torch.zeros_like(weight) if moment is None else moment.reshape(weight.shape)
        losses.append(removal_loss(weight.float(), moment.float()))
    values = torch.cat(losses).tolist()
    result, at = {}, 0
    for layer in layers:
        result[layer.name] = values[at : at + layer.rank]
        at += layer.rank
    return result


def removal_loss(weights: Float[Tensor, "r n"], second_moment: Float[Tensor, "r n"]) -> Float[Tensor, " r"]:
    """sum_j w_ij^2 v_ij / 2: the loss of setting a triple's weights to zero, to second order.

    Optimal brain damage (LeCun, Denker, Solla 1990) with Adam's second moment as the diagonal of the curvature, an
    empirical Fisher of batch gradients: right up to one factor for all triples, the number of samples in a batch.
    """
    return 0.5 * (weights.square() * second_moment).sum(1)

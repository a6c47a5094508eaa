"""Every allocation that the planted and the transfer benchmark compare: one table, and the names of its variants.

A name is an entry of `CONTENDERS`, or one of

    lora+4                        LoRA+ with this ratio
    pedyra:moves=4,init=gaussian  an entry that moves ranks, with other settings of RankConfig
    static:q=1,v=3,blocks.3.up=2  fixed ranks by layer type or name; layers without one keep the uniform rank
    only:up,down                  the whole budget of parameters spread over these layers
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml
from peft import PeftModel
from torch.optim import Optimizer

from pedyra.adapters.attach import AdaptedLayer
from pedyra.config import RankConfig
from pedyra.experiments import contender_hooks as hooks
from pedyra.experiments.autolora_look import autolora_look
from pedyra.experiments.eva_look import EVA_STEPS, eva_look
from pedyra.experiments.gora_look import by_importance, gora_look
from pedyra.experiments.looks import GRADIENT_STEPS, Looking, gradient_look, probe_look
from pedyra.experiments.loop import make_optimizer
from pedyra.methods import adalora_svd, elalora, increlora, l1ra, triadaptlora
from pedyra.methods.adalora_svd import CubicPruning
from pedyra.methods.dense_sensitivity import DenseSensitivity
from pedyra.methods.elalora import ElaLoraSettings, Elastic, orthogonal_triples
from pedyra.methods.expand import Expand
from pedyra.methods.gora import GoraSettings
from pedyra.methods.increlora import GrowFromReserve, reserve_triples
from pedyra.methods.l1ra import Gates, L1raSettings, MoveClosed, gated_triples
from pedyra.methods.para import ParaSettings
from pedyra.methods.prune import Prune
from pedyra.methods.random_moves import RandomMoves
from pedyra.methods.settings import WITHOUT_SKETCHES
from pedyra.methods.triadaptlora import CoreNorms, GrowByCore, gaussian_triples
from pedyra.training.rank_allocator import RankAllocator
from pedyra.training.rule import Policy, Rule, bidirectional, unchecked

Costs = Mapping[str, int]
"""Layer name -> parameters of one rank, in the model's order."""
Gains = Mapping[str, Sequence[float]]
"""Layer name -> gain of each candidate direction, best first."""
Pattern = Callable[[Costs, int, Gains], dict[str, int]]
"""(costs, uniform rank, gains) -> rank of every layer; the gains are empty without a look."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One allocation; without a `config` its ranks stay as they are at the start."""

    config: RankConfig | None = None
    rule: Callable[[int, int], Policy | Rule] = lambda rank, seed: bidirectional
    """(rank of the budget, seed) -> what moves the ranks."""
    moves: float | None = None
    """k as a part of the total rank, where `config` names none."""
    first_rank: Callable[[int], int] = lambda rank: rank
    """Rank of the budget -> uniform rank at the start."""
    scale: Callable[[int], float] = lambda rank: 1.0
    """Rank of the budget -> factor on the scaling at the start."""
    pattern: Pattern | None = None
    """Ranks at the start that are not uniform."""
    optimizer: Callable[[Sequence[AdaptedLayer], float], Optimizer] = make_optimizer
    """(layers, learning rate); every group has a `peak` rate, or a `constant` one."""
    look: Looking | None = None
    """Spends the first steps of the run on gains and directions, and places the first triples along them."""
    look_steps: int = 0
    """As many of them, where it is always the same number."""
    start: Callable[[PeftModel, Sequence[AdaptedLayer], int], object] | None = None
    """(model, layers, seed): changes the factors before the optimizer is built."""
    before_step: Callable[[RankAllocator], None] | None = None
    """After the allocator has read the gradients."""
    after_step: Callable[[RankAllocator], None] | None = None
    """Between the optimizer's step and the allocator's."""
    finish: Callable[[PeftModel, Sequence[AdaptedLayer], int], dict[str, int]] | None = None
    """(model, layers, rank of the budget): cuts ranks after the last step, and returns all."""

    @property
    def config_digest(self) -> str:
        """Eight hexadecimal digits of the settings, "" without any: rows of older defaults are other rows."""
        if self.config is None:
            return ""
        return hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


_WINDOW: dict[str, Any] = dict(interval=1 / 30, initial_warmup=1 / 15, final_warmup=4 / 15)
_L1RA = L1raSettings()


def _spending_parameters(settings: Mapping[str, Any]) -> RankConfig:
    return RankConfig(**{**_WINDOW, **WITHOUT_SKETCHES, **settings, "budget": "parameters"})


def _increlora(rank: int, seed: int) -> Rule:
    policy = GrowFromReserve(rank, hooks.reserve(rank), None)
    return Rule(policy=policy, scores=DenseSensitivity, new_triples=reserve_triples, check=policy.check)


def _triadaptlora(rank: int, seed: int) -> Rule:
    policy = GrowByCore(rank, max(1, rank // 2), "linear")
    return Rule(policy=policy, scores=CoreNorms, new_triples=gaussian_triples, check=unchecked)


def _elalora(rank: int, seed: int) -> Rule:
    return Rule(policy=Elastic(4, ElaLoraSettings()), new_triples=orthogonal_triples)


def _l1ra(rank: int, seed: int) -> Rule:
    return Rule(policy=MoveClosed(rank, _L1RA.threshold), scores=Gates, new_triples=gated_triples)


def _initial(rank: int) -> int:
    return rank + max(1, rank // 2)  # AdaLoRA's 1.5 times


def spread(kinds: Sequence[str], costs: Costs, rank: int, gains: Gains) -> dict[str, int]:
    """The budget of a uniform `rank`, dealt out one rank at a time to the layers of these types; none to others."""
    chosen = [name for name in costs if any(_matches(name, kind) for kind in kinds)]
    for kind in kinds:
        if not any(_matches(name, kind) for name in costs):
            raise ValueError(f"only: no layer is called {kind!r}; the layers are {_kinds(costs)}")
    ranks, left = dict.fromkeys(costs, 0), rank * sum(costs.values())
    while any(costs[name] <= left for name in chosen):
        for name in chosen:
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
    return ranks


def fixed(wanted: Mapping[str, int], costs: Costs, rank: int, gains: Gains) -> dict[str, int]:
    """The rank that `wanted` has for a layer's type or full name, the longest key first; `rank` for other layers."""
    for key in wanted:
        if not any(_matches(name, key) for name in costs):
            raise ValueError(f"static: no layer is called {key!r}; the layers are {_kinds(costs)}")
    ranks = {}
    for name in costs:
        keys = [key for key in wanted if _matches(name, key)]
        ranks[name] = wanted[max(keys, key=len)] if keys else rank
    return ranks


def by_gain(costs: Costs, rank: int, gains: Gains, min_rank: int = 0, *, per_parameter: bool = True) -> dict[str, int]:
    """The budget of a uniform `rank` for what has the highest gain, or the highest per parameter."""
    candidates = sorted(
        (-gain / (costs[name] if per_parameter else 1), position, index, name)
        for position, name in enumerate(costs)
        for index, gain in enumerate(gains[name][min_rank:])
    )
    ranks, left = dict.fromkeys(costs, min_rank), (rank - min_rank) * sum(costs.values())
    for *_, name in candidates:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _matches(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)


def _kinds(costs: Costs) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in costs))


# Every method spends parameters, not ranks, where it can: a comparison at equal budget means equal parameters.
CONTENDERS: dict[str, Contender] = {
    "lora": Contender(),
    "rslora": Contender(scale=lambda rank: rank**0.5),
    "gradient-start": Contender(look=gradient_look, look_steps=GRADIENT_STEPS),
    "gradient-ranks": Contender(look=gradient_look, look_steps=GRADIENT_STEPS, pattern=by_gain),
    "probe-start": Contender(look=probe_look),
    "probe-ranks": Contender(look=probe_look, pattern=by_gain),
    "probe-restart": Contender(look=partial(probe_look, keep=False), pattern=by_gain),
    "shares-ranks": Contender(look=partial(probe_look, points=16), pattern=by_gain),
    "random": Contender(
        config=RankConfig(**_WINDOW, **WITHOUT_SKETCHES), moves=1 / 6, rule=lambda rank, seed: RandomMoves(seed)
    ),
    "prune": Contender(
        config=RankConfig(**_WINDOW, **WITHOUT_SKETCHES),
        first_rank=_initial,
        rule=lambda rank, seed: Prune(_initial(rank), rank),
    ),
    "expand": Contender(
        config=RankConfig(**_WINDOW, **WITHOUT_SKETCHES),
        first_rank=lambda rank: max(1, rank // 2),
        rule=lambda rank, seed: Rule(policy=Expand(max(1, rank // 2), rank), check=unchecked),
    ),
    "adalora": Contender(
        config=_spending_parameters({**adalora_svd.RANK_SETTINGS, "min_rank": 0}),
        first_rank=_initial,
        rule=lambda rank, seed: CubicPruning(_initial(rank), rank),
    ),
    "elalora": Contender(config=_spending_parameters(elalora.RANK_SETTINGS), rule=_elalora),
    "l1ra": Contender(
        config=RankConfig(**{**l1ra.RANK_SETTINGS, "budget": "parameters"}, **WITHOUT_SKETCHES),
        rule=_l1ra,
        start=hooks.start_gated,
        after_step=partial(hooks.close_gates, settings=_L1RA),
        optimizer=partial(make_optimizer, gate_lr=_L1RA.gate_learning_rate),
    ),
    "increlora": Contender(
        config=RankConfig(**{**_WINDOW, **WITHOUT_SKETCHES, **increlora.RANK_SETTINGS}),
        rule=_increlora,
        first_rank=lambda rank: 1 + hooks.reserve(rank),
        scale=float,
        start=hooks.start_reserve,
        before_step=hooks.freeze_reserve,
    ),
    "triadaptlora": Contender(
        config=RankConfig(**_WINDOW, **WITHOUT_SKETCHES, **triadaptlora.RANK_SETTINGS),
        rule=_triadaptlora,
        first_rank=lambda rank: 1,
        scale=float,
        start=hooks.start_core,
    ),
    # From the budget's ranks, which its gates can only close: it ends at or below the budget.
    "sora": Contender(start=hooks.start_soft_gates, optimizer=hooks.soft_gate_adam, finish=hooks.cut_closed_gates),
    "dylora": Contender(start=hooks.start_nested, optimizer=hooks.slot_adam, finish=hooks.cut_nested),
    "para": Contender(first_rank=lambda rank: ParaSettings().factor * rank, finish=hooks.cut_at_one_threshold),
    "gora": Contender(look=gora_look, look_steps=GoraSettings().steps, pattern=by_importance),
    "eva": Contender(look=eva_look, look_steps=EVA_STEPS, pattern=partial(by_gain, per_parameter=False)),
    # A rank counts from a weight of 1 / k on, the same for all layers; here from one that meets the budget.
    "autolora": Contender(look=autolora_look, pattern=partial(by_gain, per_parameter=False)),
    "pedyra-paper": Contender(config=RankConfig.paper(**_WINDOW, budget="parameters", moves=None), moves=1 / 12),
    "pedyra": Contender(config=RankConfig()),
}


def contender(name: str, settings: Mapping[str, Any] | None = None) -> Contender:
    """The contender of this name; `settings` are further ones for `pedyra` and its variants.

    Raises:
        ValueError: an unknown name or setting, with those there are.
    """
    head, colon, rest = name.partition(":")
    if colon and head == "only":
        return Contender(pattern=partial(spread, rest.split(",")))
    if colon and head == "static":
        return Contender(pattern=partial(fixed, parse_ranks(rest)))
    plus = re.fullmatch(r"lora\+(\d+(\.\d+)?)", name)
    if plus:
        return Contender(optimizer=partial(make_optimizer, ratio=float(plus[1])))
    if head not in CONTENDERS:
        more = "lora+RATIO, static:LAYER=RANK,..., only:LAYER,..."
        raise ValueError(f"method {name!r} is unknown; choose from {', '.join(CONTENDERS)}, {more}")
    found = CONTENDERS[head]
    changes = {**parse_settings(rest.split(",") if rest else []), **(settings or {} if head == "pedyra" else {})}
    if not changes:
        return found
    if found.config is None:
        raise ValueError(f"method {name!r}: {head} moves no ranks, so it has no settings; drop {rest!r}")
    usual = RankConfig().to_dict()
    # Only what the contender sets itself is kept, so that what follows from a changed setting follows anew.
    own = {key: value for key, value in found.config.to_dict().items() if value != usual[key]}
    return replace(found, config=RankConfig.from_dict({**own, **changes}))


def check_length(contender: Contender, steps: int, name: str = "this method") -> None:
    """Raise ValueError where a run of so many steps leaves none to train."""
    if steps <= contender.look_steps:
        raise ValueError(
            f"{name} looks at {contender.look_steps} batches before it trains, so a run of {steps} "
            f"steps leaves none; take more steps"
        )


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """name=value pairs with values as in YAML, and 1e-3 as a number."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"setting {pair!r} is not of the form name=value")
        value = yaml.safe_load(text)
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value, re.IGNORECASE):
            value = float(value)
        settings[key.strip()] = value
    return settings


def parse_ranks(text: str) -> dict[str, int]:
    """ "q=1,blocks.3.up=2" -> {"q": 1, "blocks.3.up": 2}."""
    ranks = parse_settings(text.split(","))
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"static: the rank of {key!r} is {rank!r}; it must be an integer of at least 0")
    return ranks

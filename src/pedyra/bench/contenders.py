"""Every allocation that the planted and the transfer benchmark compare: one table, and the names of its variants.

A name is an entry of `CONTENDERS`, or one of

    lora+4                        LoRA+ with this ratio
    pedyra:moves=4,margin=1       an entry that moves ranks, with other settings of RankConfig
    static:q=1,v=3,blocks.3.up=2  fixed ranks by layer type or name; layers without one keep the uniform rank
    only:up,down                  the whole budget of parameters spread over these layers
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

from peft import PeftModel
from torch.optim import Optimizer

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.rule import Policy, Rule, bidirectional, default_rule, unchecked
from pedyra.bench import contender_hooks as hooks
from pedyra.bench.autolora_look import autolora_look
from pedyra.bench.eva_look import EVA_STEPS, eva_look
from pedyra.bench.gora_look import by_importance, gora_look
from pedyra.bench.looks import GRADIENT_STEPS, Looking, gradient_look, probe_look
from pedyra.bench.loop import make_optimizer
from pedyra.bench.patterns import Pattern, by_gain, fixed, parse_ranks, parse_settings, spread
from pedyra.config import RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods import adalora_svd, elalora, increlora, l1ra, triadaptlora
from pedyra.methods.adalora_svd import CubicPruning
from pedyra.methods.dense_sensitivity import DenseSensitivity
from pedyra.methods.elalora import ElaLoraSettings, Elastic, orthogonal_triples
from pedyra.methods.expand import Expand
from pedyra.methods.gora import GoraSettings
from pedyra.methods.increlora import GrowFromReserve, hold_reserve, reserve_triples
from pedyra.methods.l1ra import Gates, L1raSettings, MoveClosed, gated_triples
from pedyra.methods.para import ParaSettings
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.prune import Prune
from pedyra.methods.random_moves import RandomMoves
from pedyra.methods.settings import SCHEDULE, SCORE_FIELDS, SCORED
from pedyra.methods.triadaptlora import CoreNorms, GrowByCore, gaussian_triples


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One allocation; without a `config` its ranks stay as they are at the start."""

    configure: Callable[..., RankConfig] | None = None
    """(settings) -> the config with them in place of the contender's own."""
    open_fields: Collection[str] | None = None
    """The settings that have a part in the method; None: all."""
    rule: Callable[[RankConfig, int], Policy | Rule] = lambda config, rank: default_rule(config)
    """(config, rank of the budget) -> what moves the ranks."""
    settings: Settings | None = None
    """What a bench varies of pedyra beside its config."""
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
    """Finds what ranks are worth, in the first steps of the run or beside it, and may place the first triples."""
    look_steps: int = 0
    """As many of them, where it is always the same number."""
    start: Callable[[PeftModel, Sequence[AdaptedLayer], int], object] | None = None
    """(model, layers, seed): changes the factors before the optimizer is built."""
    ready: Callable[[RankAllocator], object] | None = None
    """Once the allocator is there, before the first step."""
    after_step: Callable[[RankAllocator], None] | None = None
    """Between the optimizer's step and the allocator's."""
    finish: Callable[[PeftModel, Sequence[AdaptedLayer], int], dict[str, int]] | None = None
    """(model, layers, rank of the budget): cuts ranks after the last step, and returns all."""

    @cached_property
    def config(self) -> RankConfig | None:
        """The settings of what moves the ranks."""
        return None if self.configure is None else self.configure()

    @property
    def config_digest(self) -> str:
        """Eight hexadecimal digits of the settings, "" without any: rows of older defaults are other rows."""
        if self.config is None:
            return ""
        told = self.config.to_dict() | ({} if self.settings is None else {"settings": asdict(self.settings)})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


_WINDOW: dict[str, Any] = dict(interval=1 / 30, initial_warmup=1 / 15, final_warmup=4 / 15)
_ADALORA_FIELDS = ("beta1", "beta2", "orth_weight")
_L1RA = L1raSettings()
_SETTINGS = [field.name for field in fields(Settings)]


def _scored(*parts: Mapping[str, Any], **settings: Any) -> Callable[..., RankConfig]:
    """What makes a config of these settings, later ones in place of earlier ones, and of more."""
    own = {key: value for part in (SCORED, *parts, settings) for key, value in part.items()}
    return lambda **changes: RankConfig.scored(**{**own, **changes})


def _increlora(config: RankConfig, rank: int) -> Rule:
    policy = GrowFromReserve(rank, hooks.reserve(rank), None)
    return Rule(
        policy=policy,
        scores=DenseSensitivity,
        new_triples=reserve_triples,
        check=policy.check,
        new_moments="seed",
    )


def _triadaptlora(config: RankConfig, rank: int) -> Rule:
    policy = GrowByCore(rank, max(1, rank // 2), "linear")
    return Rule(
        policy=policy,
        scores=CoreNorms,
        new_triples=gaussian_triples,
        check=unchecked,
        trains_e=True,
        new_moments="seed",
    )


def _elalora(config: RankConfig, rank: int) -> Rule:
    moves = 4 if config.moves is None else config.moves
    return Rule(policy=Elastic(moves, ElaLoraSettings()), new_triples=orthogonal_triples, new_moments="seed")


def _l1ra(config: RankConfig, rank: int) -> Rule:
    policy = MoveClosed(rank, _L1RA.threshold)
    return Rule(policy=policy, scores=Gates, new_triples=gated_triples, trains_e=True, new_moments="seed")


def _initial(rank: int) -> int:
    return rank + max(1, rank // 2)  # AdaLoRA's 1.5 times


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
        configure=partial(RankConfig.paper, **_WINDOW, budget="parameters", moves=None),
        open_fields=(*SCORE_FIELDS, "moves"),
        moves=1 / 6,
        rule=lambda config, rank: RandomMoves(config.seed),
    ),
    "prune": Contender(
        configure=partial(RankConfig.paper, **_WINDOW, budget="parameters", moves=None),
        open_fields=SCORE_FIELDS,
        first_rank=_initial,
        rule=lambda config, rank: Prune(_initial(rank), rank),
    ),
    "expand": Contender(
        configure=partial(RankConfig.paper, **_WINDOW, budget="parameters", moves=None),
        open_fields=SCORE_FIELDS,
        first_rank=lambda rank: max(1, rank // 2),
        rule=lambda config, rank: Rule(policy=Expand(max(1, rank // 2), rank), check=unchecked),
    ),
    "adalora": Contender(
        configure=_scored(_WINDOW, adalora_svd.RANK_SETTINGS, min_rank=0, budget="parameters"),
        open_fields=(*_ADALORA_FIELDS, "budget", "min_rank"),
        first_rank=_initial,
        rule=lambda config, rank: CubicPruning(_initial(rank), rank),
    ),
    "elalora": Contender(
        configure=_scored(_WINDOW, elalora.RANK_SETTINGS, budget="parameters"),
        open_fields=(*_ADALORA_FIELDS, "budget", "max_rank", "moves"),
        rule=_elalora,
    ),
    "l1ra": Contender(
        configure=_scored(l1ra.RANK_SETTINGS, budget="parameters"),
        open_fields=("budget", "max_rank"),
        rule=_l1ra,
        start=hooks.start_gated,
        after_step=partial(hooks.close_gates, settings=_L1RA),
        optimizer=partial(make_optimizer, gate_lr=_L1RA.gate_learning_rate),
    ),
    "increlora": Contender(
        configure=_scored(_WINDOW, increlora.RANK_SETTINGS),
        open_fields=_ADALORA_FIELDS,
        rule=_increlora,
        first_rank=lambda rank: 1 + hooks.reserve(rank),
        scale=float,
        start=hooks.start_reserve,
        ready=hold_reserve,
    ),
    "triadaptlora": Contender(
        configure=_scored(_WINDOW, triadaptlora.RANK_SETTINGS),
        open_fields=("orth_weight", "max_rank"),
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
    "pedyra-paper": Contender(
        configure=partial(RankConfig.paper, **_WINDOW, budget="parameters", moves=None), moves=1 / 12
    ),
    "pedyra": Contender(configure=lambda **settings: RankConfig.from_dict(settings)),
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
    if (configure := found.configure) is None:
        raise ValueError(f"method {name!r}: {head} moves no ranks, so it has no settings; drop {rest!r}")
    if head == "pedyra" and any(key in _SETTINGS for key in changes):
        settings_ = Settings(**{key: value for key, value in changes.items() if key in _SETTINGS})
        changes = {key: value for key, value in changes.items() if key not in _SETTINGS}
        found = replace(
            found, rule=lambda config, rank: Rule(policy=bidirectional, settings=settings_), settings=settings_
        )
    changed = replace(found, configure=partial(configure, **changes))
    assert changed.config is not None  # or it raises: of a setting that there is not, or that cannot be
    free = None if found.open_fields is None else (*SCHEDULE, *found.open_fields)
    for key in changes:
        if free is not None and key not in free:
            raise ValueError(
                f"method {name!r}: {head} has no use for {key}, or is defined by it; it takes {', '.join(free)}"
            )
    return changed


def check_length(contender: Contender, steps: int, name: str = "this method") -> None:
    """Raise ValueError where a run of so many steps leaves none to train."""
    if steps <= contender.look_steps:
        raise ValueError(
            f"{name} looks at {contender.look_steps} batches before it trains, so a run of {steps} "
            f"steps leaves none; take more steps"
        )

"""A model whose ranks move in training: the recipe's LoRA with triples attached, and the callback that moves them."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from pedyra.allocate.callback import RankCallback
from pedyra.allocate.rule import Policy, Rule, e_is_trained
from pedyra.config import RankConfig
from pedyra.lora.attach import attach, train_e
from pedyra.methods.method import Adaptation


def adaptive(model: PeftModel, config: RankConfig, rule: Policy | Rule, record_to: Path | None) -> Adaptation:
    """The Adaptation of a method that is `rule` with `config`; its only callback is the RankCallback."""
    rule = rule if isinstance(rule, Rule) else Rule(policy=rule)
    train_e(attach(model, start=config.start, seed=config.seed), e_is_trained(rule, config))
    return Adaptation(model=model, callbacks=[RankCallback(config, record_to=record_to, policy=rule)])

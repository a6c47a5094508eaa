"""set_up: a recipe's model, adapter and method, or a message that says what to change."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from pedyra.config import RankConfig
from pedyra.recipe import Recipe
from pedyra.runs.setup import check_targets, set_up


def recipe(**changes):
    content = {
        "name": "toy",
        "method": "lora",
        "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 16, "eval_rows": 8},
        "training": {"use_cpu": True},
        "seed": 3,
    }
    return Recipe.model_validate({**content, **changes})


def test_methods_choose_the_rank_settings():
    assert set_up(recipe(method="lora")).ranks is None
    for method, expected in (
        ("pedyra", RankConfig(moves=2, seed=3)),
        ("pedyra-paper", RankConfig.paper(moves=2, seed=3)),
    ):
        ranks = set_up(recipe(method=method, rank={"moves": 2})).ranks
        assert ranks is not None and ranks.config == expected


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="'pedyra-papr' is unknown; did you mean 'pedyra-paper'"):
        set_up(recipe(method="pedyra-papr"))


def test_head_and_adapter_are_those_of_the_seed_for_every_method():
    weights = {}
    for method in ("lora", "pedyra", "pedyra-paper"):
        torch.rand(7)  # whatever happened before must not matter
        weights[method] = set_up(recipe(method=method)).model.state_dict()
    own = [name for name in weights["lora"] if "lora_" in name or "classifier" in name]
    assert any("lora_A" in name for name in own) and any("classifier" in name for name in own)
    assert all(torch.equal(weights["lora"][name], weights["pedyra"][name]) for name in own)
    heads = [name for name in own if "lora_" not in name]  # the paper's start draws factors of its own
    assert all(torch.equal(weights["lora"][name], weights["pedyra-paper"][name]) for name in heads)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"], r".*\.(query|key)", ["layer.0.output.dense"]])
def test_targets_that_match_are_accepted(targets):
    base: Any = set_up(recipe()).model.get_base_model()
    check_targets(base, LoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("targets", "named"), [(["query", "valeu"], "valeu"), (r".*\.quary", "quary"), ("query", "query")]
)
def test_a_target_that_matches_nothing_is_told_with_candidates(targets, named):
    # PEFT itself would train "query" alone and never speak of "valeu".
    with pytest.raises(ValueError, match=f"{named}.*matches no module.*candidates: query, key, value, dense"):
        set_up(recipe(lora={"target_modules": targets}))

"""set_up: a recipe's model, adapter and method, or a message that says what to change."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from pedyra.config import RankConfig
from pedyra.recipe import Recipe
from pedyra.runs.setup import check_targets, rank_settings, set_up


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
    assert rank_settings(recipe(method="lora")) is None
    assert rank_settings(recipe(method="pedyra", rank={"moves": 2})) == RankConfig(moves=2, seed=3)
    assert rank_settings(recipe(method="pedyra-paper", rank={"moves": 2})) == RankConfig.paper(moves=2, seed=3)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="'pedyra-papr' is unknown; did you mean 'pedyra-paper'"):
        rank_settings(recipe(method="pedyra-papr"))


def test_head_and_adapter_are_those_of_the_seed_for_every_method():
    weights = []
    for method in ("lora", "pedyra", "pedyra-paper"):
        torch.rand(7)  # whatever happened before must not matter
        model = set_up(recipe(method=method)).model
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)


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

"""RankConfig: defaults hold, nonsense is refused with the value, the rule and the repair."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pedyra.config import CHOICES, RankConfig


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RankConfig().alpha = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        RankConfig(10)  # type: ignore[misc]


def test_survives_json():
    config = RankConfig.paper(interval=100, max_rank=16)
    assert RankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_listed_choice_is_accepted(name, value):
    assert getattr(RankConfig.from_dict({name: value}), name) == value


@pytest.mark.parametrize("name", CHOICES)
def test_other_choices_are_refused_with_the_possible_ones(name):
    with pytest.raises(ValueError, match=rf"rank\.{name} is 'nonsense'.*{CHOICES[name][0]}"):
        RankConfig.from_dict({name: "nonsense"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 0),
        ("interval", 0.0),
        ("interval", 1.0),
        ("interval", -3),
        ("interval", True),
        ("interval", "10"),
        ("interval", float("nan")),
        ("initial_warmup", -1),
        ("initial_warmup", -0.1),
        ("initial_warmup", 1.5),
        ("final_warmup", 1.0),
        ("moves", -1),
        ("moves", 1.5),
        ("moves", False),
        ("min_rank", -1),
        ("min_rank", None),
        ("max_rank", 0),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", "0.9"),
        ("alpha", 1.1),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", "0.5"),
        ("orth_weight", -0.1),
        ("orth_weight", float("nan")),
        ("orth_weight", float("inf")),
        ("orth_weight", "0.1"),
        ("omega_ema", "no"),
        ("seed", 1.5),
        ("seed", None),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_value(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"rank\.{name} is ") as error:
        RankConfig.from_dict({name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_max_rank_below_min_rank_is_refused():
    with pytest.raises(ValueError, match="max_rank is 2, below rank.min_rank 3"):
        RankConfig(min_rank=3, max_rank=2)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("intervall", "interval"), ("min_ranks", "min_rank"), ("orthweight", "orth_weight"), ("final_warm_up", "final_")],
)
def test_an_unknown_setting_names_the_nearest(typo, meant):
    with pytest.raises(ValueError, match=f"rank.{typo} is not a setting; did you mean '{meant}"):
        RankConfig.from_dict({typo: 1})


def test_an_unknown_setting_like_none_lists_them_all():
    with pytest.raises(ValueError, match="known are interval, moves"):
        RankConfig.from_dict({"xyz": 1})


def test_warmups_accept_zero_and_fractions_and_steps():
    config = RankConfig(initial_warmup=0, final_warmup=0.0, interval=1)
    assert (config.initial_warmup, config.final_warmup, config.interval) == (0, 0.0, 1)


def test_paper_is_the_paper_where_it_speaks():
    paper = RankConfig.paper()
    assert paper.moves == 12 and paper.moves_schedule == "constant"  # k, Tables 7 to 9
    assert paper.budget == "ranks" and paper.min_rank == 1  # Algorithm 2
    assert paper.orth_weight == 0.1  # gamma, Table 7
    assert paper.omega == "gradient" and not paper.omega_ema  # Eq. (5)
    assert paper.input_norm == "mean_square"  # Eq. (6)
    # Silent there; the readings of AdaLoRA's lineage.
    assert (paper.start, paper.init, paper.new_moments) == ("svd", "gaussian", "zero")
    assert (paper.beta1, paper.beta2, paper.orth_form) == (0.85, 0.85, "norm")


def test_paper_takes_overrides_and_checks_their_names():
    assert RankConfig.paper(moves=4).moves == 4
    with pytest.raises(ValueError, match="did you mean 'moves'"):
        RankConfig.paper(move=4)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({}, 0.0),  # what trials measured orders the triples
        ({"score": "importance"}, 0.0),  # Eq. (6) orders the directions, and no gradient score is asked for
        ({"score": "importance", "turn": False}, 0.5),
        ({"score": "importance", "train_e": True}, 0.5),  # then nothing is turned
        ({"prune": "score"}, 0.5),
        ({"alpha": 0.3}, 0.3),
    ],
)
def test_alpha_is_0_where_eq_6_alone_decides(settings, alpha):
    assert RankConfig(**settings).alpha == alpha


def test_the_paper_mixes_both_scores():
    assert RankConfig.paper().alpha == 0.5


@pytest.mark.parametrize(
    ("settings", "score"),
    [({}, "trial"), ({"alpha": 0.3}, "importance"), ({"prune": "score"}, "importance"), ({"score": "loss"}, "loss")],
)
def test_trials_order_the_triples_where_there_are_any_and_no_mixture_is_asked_for(settings, score):
    assert RankConfig(**settings).score == score


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"score": "trial", "prune": "score"},
            "with rank.prune 'score' there are no trials; use rank.score='importance'",
        ),
        ({"score": "trial", "alpha": 0.3}, "rank.alpha is 0.3, but it mixes the scores of Algorithm 1"),
    ],
)
def test_a_score_of_trials_without_trials_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        RankConfig(**settings)


def test_numpys_integers_are_integers():
    given: Any = {"moves": np.int64(4), "seed": np.int32(3), "interval": np.int64(9)}
    config = RankConfig(**given)
    assert config == RankConfig(moves=4, seed=3, interval=9)
    assert json.loads(json.dumps(config.to_dict()))["interval"] == 9

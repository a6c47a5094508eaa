"""RankConfig: defaults hold, nonsense is refused with the value, the rule and the repair."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any

import numpy as np
import pytest

from pedyra.config import CHOICES, REMOVED, Importance, RankConfig, without_fit


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RankConfig().interval = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        RankConfig(10)  # type: ignore[misc]


def test_survives_json():
    config = RankConfig.paper(interval=100, max_rank=16)
    assert RankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
def test_every_listed_choice_is_accepted(name, value):
    config = RankConfig(budget=value) if value == "fit" else RankConfig.scored(**{name: value})
    assert getattr(config if hasattr(config, name) else config.importance, name) == value


@pytest.mark.parametrize("name", CHOICES)
def test_other_choices_are_refused_with_the_possible_ones(name):
    with pytest.raises(ValueError, match=rf"rank\.{name} is 'nonsense'.*{CHOICES[name][0]}"):
        RankConfig.scored(**{name: "nonsense"})


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
        ("target_rank", 0),
        ("target_rank", 1.5),
        ("tolerance", 0.0),
        ("tolerance", 1),
        ("tolerance", "1%"),
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
        RankConfig.scored(**{name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_max_rank_below_min_rank_is_refused():
    with pytest.raises(ValueError, match="max_rank is 2, below rank.min_rank 3"):
        RankConfig.paper(min_rank=3, max_rank=2)


@pytest.mark.parametrize(("name", "value"), [("budget", "ranks"), ("moves", 3), ("start", "svd")])
def test_what_moves_triples_is_no_setting_of_the_default(name: str, value: Any):
    with pytest.raises(
        ValueError, match=rf"rank\.{name} is '?{value}'?, of methods that move triples; .*RankConfig.paper"
    ):
        RankConfig(**{name: value})
    assert getattr(RankConfig.paper(**{name: value}), name) == value


def test_the_default_ends_with_what_the_task_needs_and_others_do_not():
    assert RankConfig().budget == "fit" and RankConfig(moves=0).moves == 0
    with pytest.raises(ValueError, match="rank.max_rank is 8, but method pedyra lets no layer grow; lower lora.r"):
        RankConfig(max_rank=8)
    with pytest.raises(ValueError, match="rank.target_rank is 2, a size for rank.budget 'fit'"):
        RankConfig.paper(target_rank=2)
    with pytest.raises(ValueError, match="rank.budget is 'fit', of method pedyra"):
        RankConfig.paper(budget="fit")


def test_how_the_default_ends_is_left_out_of_what_others_take():
    shared = {"interval": 12, "budget": "fit", "tolerance": 0.05, "target_rank": 2}
    assert without_fit(shared) == {"interval": 12}
    assert without_fit({"budget": "ranks", "moves": 2}) == {"budget": "ranks", "moves": 2}
    with pytest.raises(ValueError, match="rank.target_rank is 0"):
        without_fit({"target_rank": 0})


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
    assert paper.importance is not None
    assert paper.moves == 12  # k, Tables 7 to 9
    assert paper.budget == "ranks" and paper.min_rank == 1  # Algorithm 2
    assert paper.orth_weight == 0.1  # gamma, Table 7
    assert paper.importance.omega == "gradient" and not paper.importance.omega_ema  # Eq. (5)
    assert paper.importance.input_norm == "mean_square"  # Eq. (6)
    # Silent there; the readings of AdaLoRA's lineage.
    assert paper.start == "svd" and paper.importance == Importance(beta1=0.85, beta2=0.85, orth_form="norm", alpha=0.5)


def test_the_papers_phases_are_the_medians_of_its_tables():
    """Rows of training data, batch, epochs, t_i, Delta_T, t_f: Tables 7 to 9."""
    glue = [
        *((392702, 32, 7, 3000, 1000, 65000), (2490, 32, 50, 300, 100, 2600), (104743, 32, 5, 1000, 500, 10000)),
        *((3668, 32, 30, 600, 150, 1100), (363846, 32, 9, 5000, 1000, 80000), (67349, 32, 24, 1000, 1000, 25000)),
        *((8551, 32, 35, 700, 100, 7000), (5749, 32, 25, 800, 200, 1500)),
    ]
    others = [(204045, 24, 25, 6000, 1500, 180000), (132000, 16, 25, 5000, 1000, 190000)]
    parts = [
        tuple(steps / (epochs * math.ceil(rows / batch)) for steps in phases)
        for rows, batch, epochs, *phases in (*glue, *others)
    ]
    # Table 8: t_f is T - 20000 there.
    parts += [tuple(steps / (t_f + 20000) for steps in (2000, 1000, t_f)) for t_f in (11250, 12765)]
    paper = RankConfig.paper()
    found = [statistics.median(column) for column in zip(*parts, strict=True)]
    assert [paper.initial_warmup, paper.interval, paper.final_warmup] == pytest.approx(found, rel=0.03)


def test_paper_takes_overrides_and_checks_their_names():
    assert RankConfig.paper(moves=4).moves == 4
    with pytest.raises(ValueError, match="did you mean 'moves'"):
        RankConfig.paper(move=4)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_says_what_took_its_place(name):
    for make in (RankConfig.from_dict, lambda given: RankConfig.paper(**given)):
        with pytest.raises(ValueError, match=rf"^rank\.{name} was removed: .") as error:
            make({name: 1})
        assert "\n" not in str(error.value)


def test_scores_are_no_setting_of_the_method_that_measures():
    with pytest.raises(ValueError, match=r"rank.alpha is of the paper's scores.*take method pedyra-paper"):
        RankConfig.from_dict({"alpha": 0.3})
    config = RankConfig.paper(alpha=0.3)
    assert config.importance is not None and config.importance.alpha == 0.3


def test_numpys_integers_are_integers():
    given: Any = {"target_rank": np.int64(4), "seed": np.int32(3), "interval": np.int64(9)}
    config = RankConfig(**given)
    assert config == RankConfig(target_rank=4, seed=3, interval=9)
    assert json.loads(json.dumps(config.to_dict()))["interval"] == 9

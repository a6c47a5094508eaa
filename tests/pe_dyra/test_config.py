"""The settings of PE-DyRA: defaults hold, nonsense is refused with the value, the rule and the repair."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch

from pedyra import PeDyra
from pedyra.pe_dyra.config import CHOICES, RankSettings
from pedyra.pe_dyra.equations import mix_scores


def test_survives_json():
    config = PeDyra.as_published(interval=100, max_rank=16)
    assert PeDyra.as_published(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_recipe_is_checked_without_torch():
    code = "import sys; import pedyra.pe_dyra.config; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_the_fields_of_pedyra_are_the_settings():
    assert PeDyra().to_dict() == dataclasses.asdict(RankSettings())


@pytest.mark.parametrize("name", CHOICES)
def test_other_choices_are_refused_with_the_possible_ones(name: str):
    nonsense: Any = {name: "nonsense"}
    with pytest.raises(ValueError, match=rf"^{name} is 'nonsense'.*{CHOICES[name][0]}"):
        PeDyra.as_published(**nonsense)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 0),
        ("interval", 1.0),
        ("interval", True),
        ("interval", "10"),
        ("initial_warmup", -1),
        ("final_warmup", 1.0),
        ("moves", -1),
        ("moves", 1.5),
        ("min_rank", -1),
        ("max_rank", 0),
        ("beta1", 1.0),
        ("alpha", 1.1),
        ("alpha", -0.1),
        ("alpha", "0.5"),
        ("orth_weight", -0.1),
        ("orth_weight", float("inf")),
        ("seed", 1.5),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_value(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{name} is ") as error:
        PeDyra.as_published(**{name: value})
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_max_rank_below_min_rank_is_refused():
    with pytest.raises(ValueError, match="max_rank is 2, below min_rank 3"):
        PeDyra.as_published(min_rank=3, max_rank=2)


def test_as_published_is_the_paper_where_it_speaks():
    paper = PeDyra.as_published()
    assert paper.moves == 12  # k, Tables 7 to 9
    assert paper.budget == "ranks" and paper.min_rank == 1  # Algorithm 2
    assert paper.orth_weight == 0.1  # gamma, Table 7
    assert paper.omega == "gradient"  # Eq. (5)
    assert paper.input_norm == "mean_square"  # above Eq. (6)
    # Silent there; the readings of AdaLoRA's lineage.
    assert (paper.start, paper.beta1, paper.beta2, paper.orth_form, paper.alpha) == ("svd", 0.85, 0.85, "norm", 0.5)


def test_the_default_departs_from_the_paper_in_four_fields_and_the_number_of_moves():
    ours, paper = PeDyra(moves=12).to_dict(), PeDyra.as_published().to_dict()
    assert {name for name in ours if ours[name] != paper[name]} == {"start", "orth_weight", "min_rank", "interval"}
    assert PeDyra.as_published(alpha=0.3).to_dict() == {**paper, "alpha": 0.3}


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
    paper = PeDyra.as_published()
    found = [statistics.median(column) for column in zip(*parts, strict=True)]
    assert [paper.initial_warmup, paper.interval, paper.final_warmup] == pytest.approx(found, rel=0.03)


def test_a_whole_number_is_a_weight_too():
    config = PeDyra.as_published(alpha=1, beta1=0, orth_weight=0)
    assert [type(value) for value in (config.alpha, config.beta1, config.orth_weight)] == [float] * 3
    assert mix_scores(torch.ones(2), torch.ones(2), alpha=config.alpha, norm="mean").tolist() == [1.0, 1.0]


def test_a_new_triple_has_a_step_at_least_before_the_next_adjustment():
    """It begins at zero, where its score is exactly zero."""
    assert PeDyra.as_published(interval=0.001).schedule(100).interval == 2
    assert PeDyra.as_published(interval=2).schedule(100).interval == 2
    with pytest.raises(ValueError, match="interval is 1, .*fewer than 2 steps"):
        PeDyra.as_published(interval=1).schedule(100)

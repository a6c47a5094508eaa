"""`python -m benchmarks.energy` spends the parameters where the energy of a trained adapter is."""

from __future__ import annotations

from itertools import product

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.command import command_line
from benchmarks.energy import energy, ranks_by_energy


def test_the_ranks_have_the_most_energy_of_all_that_cost_no_more():
    """Every layer costs the same, so that the greedy choice is the best one, which trying all finds."""
    energies = {"a": [9.0, 4.0, 1.0], "b": [5.0, 0.5, 0.1], "c": [0.2, 0.1, 0.05]}
    ranks = ranks_by_energy(energies, dict.fromkeys(energies, 10), 1)
    choices = [choice for choice in product(range(4), repeat=3) if sum(choice) <= 3]
    best = max(choices, key=lambda choice: sum(sum(v[:n]) for v, n in zip(energies.values(), choice, strict=True)))
    assert tuple(ranks.values()) == best


def test_a_direction_is_worth_its_energy_a_parameter():
    assert ranks_by_energy({"wide": [3.0], "thin": [2.0, 1.9]}, {"wide": 20, "thin": 10}, 1) == {"wide": 0, "thin": 2}


def test_what_it_prints_is_the_lora_of_a_recipe(tmp_path, capsys):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0", "1"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=10.0 if ".1." in name else 0.1)
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        command_line(energy, [str(tmp_path), "--rank", "1"])
    assert end.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out) == {"rank_pattern": {"1": 2}, "exclude_modules": ["0"]}

"""`pedyra search`: ranks from the singular values of a short wide run, as a plain LoraConfig."""

from __future__ import annotations

import json
import shlex
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from pedyra.bench.rank_search import choose_ranks, search_ranks, singular_values, wide_recipe
from pedyra.cli import app
from pedyra.recipe import load_recipe

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


def _factors(out, width, values):
    """B A with these singular values, split between the factors in no special way."""
    left = torch.linalg.qr(torch.randn(out, out)).Q[:, : len(values)]
    right = torch.linalg.qr(torch.randn(width, width)).Q[:, : len(values)]
    mix = torch.randn(len(values), len(values))
    return left * torch.tensor(values) @ mix, torch.linalg.solve(mix, right.T)


def test_singular_values_are_those_of_the_product():
    B, A = torch.randn(7, 3), torch.randn(3, 5)
    torch.testing.assert_close(singular_values(B, A), torch.linalg.svdvals(B @ A)[:3])
    torch.testing.assert_close(singular_values(*_factors(6, 4, [3.0, 1.0])), torch.tensor([3.0, 1.0]))


def test_ranks_go_where_the_update_has_most_per_parameter():
    factors = {
        "a": _factors(6, 4, [5.0, 4.0, 0.1]),  # a rank costs 10: 2.5, 1.6, 0.001 per parameter
        "b": _factors(10, 10, [4.0, 1.0, 1.0]),  # 20: 0.8, 0.05, 0.05
        "c": _factors(6, 4, [0.5, 0.4, 0.3]),  # 10: 0.025, 0.016, 0.009
    }
    found = choose_ranks(factors, 2, scaling=3.0)
    assert found.costs == {"a": 10, "b": 20, "c": 10} and found.budget == 80
    # 10 + 10 + 20 + 20 + 20 are 80: both of a, all of b, nothing for c.
    assert found.ranks == {"a": 2, "b": 3, "c": 0} and found.parameters == 80
    # One each is certain; 40 are left for 1.6 and 0.05, and 10 of them for 0.016.
    assert choose_ranks(factors, 2, min_rank=1).ranks == {"a": 2, "b": 2, "c": 2}
    assert found.lora_arguments() == {
        "r": 2,
        "lora_alpha": 6.0,
        "target_modules": ["a", "b"],
        "rank_pattern": {"a": 2, "b": 3},
        "alpha_pattern": {"a": 6.0, "b": 9.0},
    }


def test_the_arguments_make_a_lora_of_these_ranks_and_one_scaling():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 6)
            self.block = nn.ModuleDict({"up": nn.Linear(10, 10), "down": nn.Linear(4, 6)})

    factors = {
        "up": _factors(6, 4, [5.0, 4.0]),
        "block.up": _factors(10, 10, [4.0, 1.0]),
        "block.down": _factors(6, 4, [0.1]),
    }
    found = choose_ranks(factors, 1, scaling=2.0)
    model = get_peft_model(Net(), LoraConfig(**found.lora_arguments()))  # type: ignore[arg-type]
    made = {
        name.removesuffix(".lora_A.default").removeprefix("base_model.model."): module.out_features
        for name, module in model.named_modules()
        if name.endswith("lora_A.default") and isinstance(module, nn.Linear)
    }
    assert made == {name: rank for name, rank in found.ranks.items() if rank} == {"up": 2, "block.up": 1}
    assert {s for module in model.modules() for s in getattr(module, "scaling", {}).values()} == {2.0}


def test_the_command_trains_a_wide_run_and_writes_what_peft_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "search",
        str(SMOKE),
        "training.max_steps=8",
        "lora.alpha=32",
        "lora.target_modules=[query,value]",
        "--part",
        "0.5",
        "--json",
        "rows.jsonl",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert rows[-1]["layer"] == "total" and rows[-1]["parameters"] == sum(row["parameters"] for row in rows[:-1])
    made = json.loads(Path("runs/smoke-search/ranks.json").read_text())
    assert sum(made["rank_pattern"].values()) == rows[-1]["rank"]
    LoraConfig(**made)
    metrics = [json.loads(line) for line in Path("runs/smoke-search/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 4
    (shown,) = (line for line in result.output.splitlines() if line.startswith("train it"))
    told = shlex.split(shown.removeprefix("train it    pedyra "))
    assert told[0] == "train" and {
        "lora.alpha=32",
        "lora.target_modules=[query,value]",
        "method=lora",
        "output_dir=runs/smoke-found",
    } <= set(told)
    result = CliRunner().invoke(app, [*told, "training.max_steps=4", "--json", "found.jsonl"])
    assert result.exit_code == 0, result.output
    config = json.loads(Path("runs/smoke-found/adapter/adapter_config.json").read_text())
    scaling = {config["alpha_pattern"][key] / rank for key, rank in config["rank_pattern"].items()}
    assert scaling == {made["lora_alpha"] / made["r"]}
    _, *layers = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    found = {row["layer"]: row for row in rows[:-1] if row["rank"]}
    assert {row["layer"]: row for row in layers} == found
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ValueError) and "--overwrite" in str(again.exception)


def test_the_search_run_is_plain_lora_whatever_the_recipe_trains():
    recipe = load_recipe(
        SMOKE, ["method=adalora", "lora.init=pissa", "lora.use_dora=true", "rank={}", "lora.ranks={query: 1}"]
    )
    wide = wide_recipe(recipe, 3, 7)
    assert (wide.method, wide.lora.r, wide.lora.alpha, wide.lora.init, wide.lora.use_dora) == (
        "lora",
        12,
        24,
        True,
        False,
    )
    assert wide.lora.ranks is None
    assert wide.training["max_steps"] == 7 and wide.output_dir == "runs/smoke-search" and wide.data == recipe.data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"part": 0.0}, "--part is 0.0"),
        ({"widen": 1}, "take 2 or more"),
        ({"min_rank": 5}, "between 0 and lora.r, 4"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        search_ranks(load_recipe(SMOKE), overwrite=False, console=None, **settings)  # type: ignore[arg-type]


def test_a_scaling_that_depends_on_the_rank_is_refused():
    with pytest.raises(ValueError, match="use_rslora"):
        wide_recipe(load_recipe(SMOKE, ["lora.use_rslora=true"]), 4)


def test_a_search_for_an_unknown_method_is_refused():
    recipe = load_recipe(SMOKE, ["method=foo"])
    with pytest.raises(ValueError, match="method 'foo' is unknown"):
        search_ranks(recipe, overwrite=False, console=Console(file=StringIO()))

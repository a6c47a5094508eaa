"""A grid is read as written, refuses what would be no comparison, and knows when it is the same one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pedyra.lab.compare.grid import check_grid, load_grid

RECIPES = Path(__file__).parents[3] / "recipes"


def test_reading_a_grid_loads_nothing_heavy():
    code = "import sys, pedyra.lab.compare.grid as g; g.load_grid(sys.argv[1]); print('torch' in sys.modules)"
    path = str(RECIPES / "compare_facts.yaml")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_lists_are_short_for_rows_and_tasks_without_settings(make_grid):
    grid = make_grid(methods=["lora", "dora"], tasks=["toy", "cola"])
    assert {name: row.method.name for name, row in grid.methods.items()} == {"lora": "lora", "dora": "dora"}
    assert grid.tasks == {"toy": {}, "cola": {}}
    assert (grid.name, grid.output_dir, grid.baseline, grid.all_budgets) == ("grid", "runs/grid", "lora", [2])


def test_a_row_has_its_own_method_settings_and_rates(make_grid):
    rows = {"pedyra": {}, "pedyra on dora": {"method": "pedyra", "lora": {"use_dora": True}, "learning_rates": [3, 1]}}
    grid = make_grid(methods=rows)
    assert grid.methods["pedyra on dora"].method.name == "pedyra"
    assert grid.rates("pedyra on dora") == [1, 3] and grid.rates("pedyra") == [0.01, 0.1]
    assert grid.baseline == "pedyra"  # the first, where there is no lora


def test_without_rates_a_grid_has_that_of_a_recipe(folder):
    content = {"name": "x", "model": {"name": "tiny-bert"}, "methods": ["lora"], "tasks": ["toy"], "seeds": [0]}
    assert check_grid(content, "x").rates("lora") == [2e-4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[lora, pedira]", "method 'pedira' is unknown; did you mean 'pedyra'?"),
        ("tasks=[colla]", "task 'colla' is unknown; did you mean 'cola'?"),
        ("tasks.mine={task: sst}", "task 'sst' is unknown; did you mean 'sst2'?"),
        ("methods=[]", "methods is {}: Dictionary should have at least 1 item"),
        ("seeds=[0, 1000]", "seed 1000 is in seeds and in tuning.seeds"),
        ("seeds=[4294967296]", "seeds.0 is 4294967296: Input should be less than or equal to 4294967295"),
        ("methods={../up: {method: lora}}", "'../up' is the name of a folder too"),
        ("tasks={'a\\b': {source: toy}}", "is the name of a folder too"),
        ("learning_rates=[0]", "learning_rates.0 is 0: Input should be greater than 0"),
        ("learning_rates=[.inf]", "learning_rates.0 is inf: Input should be a finite number"),
        ("methods.lora.lora.use_rslora=x", "methods.lora.lora.use_rslora is 'x'"),
        ("training.load_best_model_at_end=true", "chooses each run's step on the rows that are reported; leave it out"),
        ("training.learning_rate=1", "training.learning_rate is given; a grid has it as learning_rates"),
        ("match=memory", "match is 'memory': Input should be 'parameters' or 'rank'"),
        ("seed=[0]", "unknown key 'seed'; did you mean 'seeds'?"),
        ("methods.lora.learning_rate=[1]", "unknown key 'methods.lora.learning_rate'; did you mean"),
        ("methods.lora.training.max_steps=3", "unknown key 'methods.lora.training'"),
        ("lora.r=0", "lora.r is 0"),
        ("methods.lora.lora.r=3", "methods.lora.lora.r follows from budgets and match"),
    ],
)
def test_a_mistake_is_one_line(make_grid, override: str, message: str):
    methods = {"lora": {}, "pedyra": {}}  # a mapping, so that overrides reach into it
    with pytest.raises(ValueError) as caught:
        make_grid(override, methods=methods)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_folder_of_a_comparison_may_be_in_the_users_home(make_grid, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert make_grid("output_dir=~/x").output_dir == "/home/ada/x"  # where every one of its runs is, too


def test_a_resolved_grid_is_read_back_equal(make_grid, folder: Path):
    grid = make_grid(budgets=[2, 4], tasks=["toy", "cola"]).model_copy(update={"name": "5e-4"})
    (folder / "again.yaml").write_text(grid.to_yaml())
    assert load_grid(folder / "again.yaml") == grid


@pytest.mark.parametrize("path", sorted(RECIPES.glob("compare_*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid(path: Path):
    assert load_grid(path).name == path.stem


@pytest.mark.parametrize("name", ["compare_short", "compare_minilm"])
def test_the_ablations_choose_from_the_rates_of_pedyra(name):
    """All of them start as it does."""
    grid = load_grid(RECIPES / f"{name}.yaml")
    for ablation in ("prune", "expand", "random"):
        assert grid.rates(ablation) == grid.rates("pedyra")

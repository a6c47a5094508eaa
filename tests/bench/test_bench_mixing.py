"""bench mixing: which of Algorithm 1's two scores decides what is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pedyra.bench.bench_mixing import bench_mixing, compare_mixtures
from pedyra.cli import main
from pedyra.recipe import load_recipe

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


class OneLayer:
    """What the rows need of an allocator."""


def test_overlaps_by_hand(monkeypatch):
    from pedyra.bench import bench_mixing as module

    gradient = torch.tensor([1.0, 4.0, 2.0, 8.0])
    inputs = torch.tensor([3000.0, 2000.0, 1000.0, 6000.0])

    class Source:
        def triple_scores(self, *, alpha, score_norm, input_norm, omega):
            g, x = (gradient, inputs) if score_norm == "none" else (gradient / 3.75, inputs / 3000)
            return {"layer": (alpha * g + (1 - alpha) * x).tolist()}

    monkeypatch.setattr(module, "TripleScores", Source)
    allocator = OneLayer()
    allocator.__dict__ |= dict(
        config=type("Config", (), dict(input_norm="rms", omega="uniform", min_rank=0)),
        scores=Source(),
        moves=2,
        ranks={"layer": 4},
        step=9,
    )
    literal, scaled = compare_mixtures(allocator, [("none", 0.5), ("mean", 0.5)])  # type: ignore[arg-type]
    # By gradient 0 and 2 go, by inputs 2 and 1. The literal sum follows the inputs. Twice the scaled one is
    # 1.27, 1.73, 0.87, 4.1.
    assert literal["with_inputs"] == 1 and literal["with_gradient"] == 0.5
    assert scaled["with_inputs"] == 0.5 and scaled["with_gradient"] == 1
    assert literal["each_other"] == 0.5 and literal["by_chance"] == 0.5
    assert literal["ratio"] == 800 and literal["step"] == 10


def test_a_run_of_the_papers_method_has_a_row_per_adjustment_and_mixture():
    rows = bench_mixing(load_recipe(SMOKE, ["method=pedyra-paper", "training.max_steps=26"]))
    assert sorted({row["step"] for row in rows}) == [10, 15]
    assert len(rows) == 2 * 6
    # The literal sum, whatever its alpha: S_inp is so much larger that S_grad has no say.
    assert all(row["with_inputs"] == 1 for row in rows if row["score_norm"] == "none")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora"], "only pedyra and pedyra-paper"),
        ([], "rank.prune is 'trial'"),
        (["method=pedyra-paper", "rank.alpha=1.0"], "rank.alpha 1.0"),
    ],
)
def test_a_recipe_that_mixes_nothing_is_refused(overrides, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "mixing", str(SMOKE), *overrides])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

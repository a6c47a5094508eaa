"""Masking (Fig. 8): which triples, and that they stay and can come back."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from pedyra.methods.ablations import Mask


def test_the_nth_adjustment_masks_n_k_triples_but_a_layers_best(situation: Any):
    scores = {"a": [0.1, 0.9, 0.2], "b": [0.4, 0.3]}
    ranks = {"a": 3, "b": 2}
    first = Mask().plan(scores, situation(ranks, moves=2, min_rank=1))
    assert first.masked == {"a": (0, 2)} and first.ranks == ranks and not first.pruned and not first.added
    second = Mask().plan(scores, situation(ranks, moves=2, min_rank=1, step=6))
    assert second.masked == {"a": (0, 2), "b": (1,)}  # four were due, but each layer keeps its best


class Core(TrainerCallback):
    """E of every layer, after the step of the first adjustment."""

    def __init__(self, run: Any) -> None:
        self.run, self.seen = run, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.seen = {layer.name: layer.a.E.detach().clone() for layer in self.run.allocator.layers}


def test_masked_triples_are_zero_after_an_adjustment_and_learn_again(prepare: Any):
    run = prepare("mask", settings={"moves": 3})
    core = Core(run)
    run.trainer.add_callback(core)
    run.train()
    first, *_, last = run.allocator.history
    assert [len(record["masked"]) for record in run.allocator.history] == [3, 6, 9]
    assert first["step"] == 4 and all(core.seen[name][i] == 0 for name, i in first["masked"])
    assert sum(int((E == 0).sum()) for E in core.seen.values()) == 3
    assert set(last["ranks"].values()) == {4}
    assert all(layer.a.E.ne(0).all() for layer in run.allocator.layers)  # four steps after the last adjustment

"""IncreLoRA: the dense score, growth from a frozen reserve, and an exact budget at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from windows import run_of

from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.increlora import DenseSensitivity, IncreLora, dense_sensitivity
from pedyra.methods.sizes import growth


def test_the_score_is_that_of_the_dense_update():
    """|dW * dL/d dW| summed, by autograd on the dense update itself, as the authors' backward hook sees it."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 5, generator=generator), torch.randn(4, 3, generator=generator)
    E, x = torch.randn(3, generator=generator), torch.randn(2, 7, 5, generator=generator)
    scaling = 2.5
    dense = (scaling * (B * E) @ A).requires_grad_()
    loss = (x @ dense.T).pow(2).sum()
    loss.backward()
    assert dense.grad is not None
    expected = (dense.detach() * dense.grad).abs().sum() / (4 * 5) ** 0.5
    slot = (x @ (E[:, None] * A).T @ B.T).requires_grad_()
    (scaling * slot).pow(2).sum().backward()
    assert slot.grad is not None
    torch.testing.assert_close(dense_sensitivity(x, slot.grad, A, E, B), expected)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    A, B, E = torch.randn(2, 6), torch.randn(9, 2), torch.randn(2)
    x, gradient = torch.randn(8, 6), torch.randn(8, 9)
    whole = dense_sensitivity(x, gradient, A, E, B)
    monkeypatch.setattr("pedyra.methods.increlora._BLOCK_ELEMENTS", 12)
    torch.testing.assert_close(dense_sensitivity(x, gradient, A, E, B), whole)


def test_the_best_layers_grow_ties_in_layer_order_and_never_beyond_the_budget():
    scores = {"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}
    active = dict.fromkeys("abcd", 1)
    assert growth(scores, active, missing=12, top=2, add=2) == {"b": 2, "a": 2}
    assert growth(scores, active, missing=3, top=3, add=2) == {"b": 2, "a": 1}


def test_growth_activates_the_reserve_and_rescales(situation: Any):
    method = IncreLora(final_rank=4)
    plan = method.plan({"a": [3.0] * 3, "b": [1.0] * 3}, situation({"a": 3, "b": 3}))
    # a: 1 active and 2 in reserve -> 3 active and 2 in reserve; alpha / r falls from alpha to alpha / 3.
    assert plan.ranks == {"a": 5, "b": 3} and plan.rescale == {"a": 1 / 3} and not plan.pruned


def test_at_the_budget_what_is_left_of_the_reserves_goes(situation: Any):
    method = IncreLora(final_rank=4)
    # active 5 + 2 = 7 of 8: one more rank, to b; its other reserve rank and both of a's go.
    now = situation({"a": 7, "b": 4}, initial_ranks={"a": 3, "b": 3}, history=[{"added": {"a": 2}}])
    plan = method.plan({"a": [1.0] * 7, "b": [9.0] * 4}, now)
    assert plan.pruned == {"a": (5, 6), "b": (3,)} and plan.ranks == {"a": 5, "b": 3} and not plan.added
    assert plan.rescale == {"b": 2 / 3}
    after = method.plan({"a": [1.0] * 5, "b": [9.0] * 3}, situation(plan.ranks, history=[{"added": {}}]))
    assert after.ranks == plan.ranks and not after.pruned


def test_a_compiled_model_is_refused_for_its_layers_show_no_gradients(prepare: Any):
    assert not prepare("increlora").work.ranks.compiles and prepare("pedyra").work.ranks.compiles


def test_a_run_grows_from_one_to_the_budget(prepare: Any):
    run = prepare("increlora").train()
    layers = len(run.allocator.layers)
    active = [record["total_rank"] - 2 * layers for record in run.allocator.history[:-1]]
    assert active == sorted(active) and layers < active[0]
    assert sum(run.allocator.ranks.values()) == 4 * layers
    for layer in run.allocator.layers:
        assert layer.scaling == pytest.approx(32 / layer.rank)


def test_reserve_e_stays_while_its_factors_learn(prepare: Any):
    """Weight decay needs no gradient."""
    training = {"max_steps": 12, "weight_decay": 0.5}
    run = prepare("increlora", training=training, settings={"initial_warmup": 6, "interval": 1})
    layers = run.model.get_base_model().bert.encoder.layer[0].attention.self.query
    a = layers.lora_A["default"]
    A, stop = a.A.detach().clone(), []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                stop.append((a.E.detach().clone(), a.A.detach().clone()))

    run.trainer.add_callback(Look())
    run.train()
    E, moved = stop[0]
    assert E[1:].tolist() == pytest.approx([1e-5, 1e-5], rel=1e-6) and E[0] != 0
    assert (moved[1:] - A[1:]).abs().max() > 1e-4


def test_the_reserve_has_no_part_in_the_norm_that_is_clipped_until_it_is_activated(prepare: Any):
    seen: list[tuple[int, list[torch.Tensor], list[int]]] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layers = run.allocator.layers
            gradients = [layer.a.E.grad.clone() for layer in layers]
            seen.append((len(run.allocator.history), gradients, [layer.rank for layer in layers]))

    run = prepare("increlora", training={"max_grad_norm": 1e9, "weight_decay": 0.5, "logging_steps": 1})
    run.trainer.callback_handler.callbacks.insert(0, Look())
    run.train()
    closed = next(index for index, record in enumerate(run.allocator.history) if not record["added"]) + 1
    for adjustments, gradients, _ in seen:
        for gradient in gradients:
            assert bool(gradient[-2:].any()) == (adjustments >= closed)
            assert bool(gradient[:-2].any()) or adjustments >= closed
    assert len({tuple(ranks) for _, _, ranks in seen}) > 2  # Parameters were renewed on the way


def one_trained_layer() -> tuple[Any, AdaptedLayer, torch.Tensor]:
    """A model of one layer, that layer, and an input."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    (layer,) = attach(model)
    torch.nn.init.normal_(layer.b.weight)
    return model, layer, torch.randn(5, 4)


def test_a_scaled_loss_has_the_same_scores():
    model, layer, x = one_trained_layer()
    scores = []
    for scale in (1.0, 1024.0):
        source = DenseSensitivity(run_of([layer]), IncreLora())
        source.watch(True)
        (scale * model(x).square().sum()).backward()
        source.observe(loss_scale=scale, begins=True, adjusts=True)
        source.watch(False)
        scores.append(source.layer_scores())
    assert scores[0] > 0
    torch.testing.assert_close(scores[1], scores[0])


def test_what_is_seen_in_a_step_that_is_thrown_away_is_not_scored():
    model, layer, x = one_trained_layer()
    model.eval()  # trained without dropout
    scores = []
    for thrown_away in (False, True):
        source = DenseSensitivity(run_of([layer]), IncreLora())
        source.watch(True)
        if thrown_away:
            (1e3 * model(x).square().sum()).backward()
            source.forget()
        model(x).square().sum().backward()
        source.observe(loss_scale=1.0, begins=True, adjusts=True)
        source.watch(False)
        scores.append(source.layer_scores())
    assert scores[0] > 0 and same_bits(scores[1], scores[0])


def test_the_active_rank_has_a_gradient_at_the_first_step(prepare: Any):
    for name, gradient in prepare("increlora").gradients().items():
        if name.endswith(".E"):
            assert gradient[0] != 0


def test_where_no_layer_can_grow_the_reserves_go_though_the_budget_is_not_met(situation: Any):
    method = IncreLora(final_rank=4)
    now = situation(
        {"a": 5, "b": 4}, initial_ranks={"a": 3, "b": 3}, history=[{"added": {"a": 2}}], max_ranks={"a": 4, "b": 3}
    )  # active 3 and 2
    plan = method.plan({"a": [1.0] * 5, "b": [9.0] * 4}, now)
    assert plan.pruned == {"a": (3, 4), "b": (2, 3)} and plan.ranks == {"a": 3, "b": 2} and not plan.added

"""DyLoRA: the first b ranks at alpha / b, one draw a forward, and a cut to any rank that stock PEFT reproduces."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from pedyra.methods.dylora import NestedRank


def nest(model: Any, seed: int = 0) -> NestedRank:
    nested = NestedRank(model, seed=seed)
    nested.nest()
    return nested


def expected_delta(layer: Any, rank: int, alpha: float) -> torch.Tensor:
    """alpha / b times the sum over the first b ranks of column times row."""
    A, B = layer.a.rows.detach(), layer.b.columns.detach()
    return alpha / rank * torch.stack([torch.outer(B[:, i], A[i]) for i in range(rank)]).sum(0)


def test_a_rank_is_the_first_rows_scaled_by_alpha_over_it(make_net):
    model = make_net(trained=True, r=4, lora_alpha=8)
    nested = nest(model)
    for rank in (1, 3, 4):
        nested.choose(rank)
        for layer in nested.layers:
            torch.testing.assert_close(layer.module.get_delta_weight("default"), expected_delta(layer, rank, 8))


def test_a_training_forward_equals_evaluation_at_the_rank_it_drew(make_net, net_batch):
    model, (x, _) = make_net(trained=True), net_batch(1)
    nested = nest(model)
    seen = set()
    for step in range(12):
        nested.step_begins(step)
        trained = model.train()(x)
        nested.choose(nested.train_rank)
        torch.testing.assert_close(model.eval()(x), trained)
        seen.add(nested.train_rank)
    assert seen == {1, 2, 3, 4}


def test_which_rows_have_a_gradient(make_net, net_batch):
    model, (x, y) = make_net(trained=True).train(), net_batch(1)
    nested = nest(model, seed=3)
    nested.step_begins(next(step for step in range(99) if Random(f"3/{step}").randint(1, 4) == 3))
    (model(x) - y).square().mean().backward()
    layers: list[Any] = nested.layers
    for layer in layers:
        touched = [bool(row.any()) for row in layer.a.rows.grad]
        assert touched == [False, False, True, False]
        assert [bool(column.any()) for column in layer.b.columns.grad.T] == touched


def test_draws_are_uniform_one_a_step_and_depend_on_the_step_and_seed_alone(make_net):
    def draw(seed: int, step: int) -> int:
        nested = nest(make_net(), seed=seed)
        nested.step_begins(step)
        return nested.train_rank

    assert draw(0, 7) == draw(0, 7)
    assert [draw(0, step) for step in range(20)] != [draw(1, step) for step in range(20)]
    counts = Counter(draw(0, step) for step in range(2000))
    # Chi-square with 3 degrees of freedom is above 16.3 once in a thousand.
    assert sum((counts[rank] - 500) ** 2 / 500 for rank in range(1, 5)) < 16.3


def test_the_micro_batches_of_a_step_share_one_draw_and_its_last_row_alone_learns(prepare):
    run = prepare("dylora", training={"gradient_accumulation_steps": 2, "max_steps": 3})
    layer = run.work.layers[0]
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([index + 1 for index, row in enumerate(layer.b.columns.grad.T) if row.any()])

    run.trainer.add_callback(Look())
    run.trainer.train()
    assert seen == [[Random(f"0/{step}").randint(1, 4)] for step in range(3)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_use_the_rank_of_their_forward(
    make_llama, tokens, checkpoint_activations, reentrant: bool
):
    gradients, draws = [], []
    for checkpointed in (False, True):
        model = make_llama(r=4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        nested = nest(model, seed=5)
        if checkpointed:
            checkpoint_activations(model, reentrant)
        model.train()
        nested.step_begins(next(step for step in range(99) if Random(f"5/{step}").randint(1, 4) == 2))
        model(**tokens, labels=tokens["input_ids"], use_cache=False).loss.backward()
        gradients.append([layer.a.rows.grad for layer in nested.layers])
        draws.append(nested.train_rank)
    assert draws[0] == draws[1] < 4
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_every_rank_is_evaluated_after_one_run(prepare):
    run = prepare("dylora")
    nested = run.work
    end, run.work.end = run.work.end, lambda: None
    run.trainer.train()
    logits, losses = {}, set()
    for rank in (1, 2, 3, 4):
        nested.choose(rank)
        logits[rank] = run.logits()
        losses.add(round(run.trainer.evaluate()["eval_loss"], 6))
    assert len(losses) == 4
    nested.choose(2)
    end()
    torch.testing.assert_close(run.logits(), logits[2])


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_what_is_saved_is_plain_lora_of_the_chosen_rank(prepare, make_base, tmp_path, kind: str):
    run = prepare("dylora", kind, settings={"rank": 3})
    end, run.work.end = run.work.end, lambda: None
    run.trainer.train()
    expected = run.logits()
    end()
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    loaded: Any = PeftModel.from_pretrained(base, tmp_path).eval()
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 32, {})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**run.batch()).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(**run.batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_ranks_and_layers_that_cannot_be_nested_are_refused(make_net):
    with pytest.raises(ValueError, match=r"the layers have ranks \[2, 4\]"):
        nest(make_net(rank_pattern={"1": 2}))
    with pytest.raises(ValueError, match="rank is 5, but the LoRA has ranks 1 to 4"):
        nest(make_net()).choose(5)

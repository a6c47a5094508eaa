"""The gradients that count: of the whole optimizer step, finite, unscaled, each token once, when someone reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from torch import nn
from windows import forced, inside, take_step, trainable

from pedyra.allocate.rank_allocator import RankAllocator

WINDOW: dict[str, Any] = {
    "interval": 3,
    "initial_warmup": 0,
    "final_warmup": 3,
    "moves": 2,
}


def allocate(model: Any, given: dict[str, Any] | None = None, total_steps: int = 30) -> RankAllocator:
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    return RankAllocator(model, optimizer, total_steps=total_steps, **(given or forced(**WINDOW)))


def scores_of(records: list[dict[str, Any] | None]) -> dict[str, list[float]]:
    (record,) = [record for record in records if record is not None]
    return record["scores"]


def assert_same_scores(ours: dict[str, list[float]], expected: dict[str, list[float]], rel: float) -> None:
    assert list(ours) == list(expected)
    for name in expected:
        assert ours[name] == pytest.approx(expected[name], rel=rel, abs=rel)


def language_model_loss(model: Any, batch: dict[str, torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
    """Summed over the real next tokens, so that micro-batches add up to the batch exactly."""
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def test_accumulation_scores_the_whole_batch_once(make_llama, tokens):
    results = []
    for micro in ([slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        model = make_llama(init_lora_weights=False).train()
        allocator, records = allocate(model), []
        for _ in range(3):
            for rows in micro:
                language_model_loss(model, tokens, rows).backward()
            records.append(take_step(allocator))
        results.append(scores_of(records))
    assert_same_scores(results[1], results[0], rel=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tracking_only_when_needed_equals_tracking_always(alpha, make_net, train_net, monkeypatch):
    results = []
    for full in (False, True):
        model = make_net()
        given = forced(interval=130, initial_warmup=30, final_warmup=20, alpha=alpha, moves=1)
        allocator = allocate(model, given, total_steps=320)
        tracked = sum(allocator.run.observes(t) for t in range(1, 321))
        assert tracked == 2 * 103  # of 320: W = 103 steps before each of the two adjustments
        if full:
            monkeypatch.setattr(allocator.run, "window", 10**6)
            allocator.run.prepare(0)
        results.append(train_net(model, allocator.optimizer, allocator, 320))
    for few, all_ in zip(*results, strict=True):
        assert few["pruned"][0][:2] == all_["pruned"][0][:2] and few["ranks"] == all_["ranks"]
        assert_same_scores(few["scores"], all_["scores"], rel=1e-5)


def test_inputs_of_untracked_steps_are_not_looked_at(make_net, train_net):
    model = make_net()
    allocator = allocate(
        model,
        forced(interval=130, initial_warmup=0, final_warmup=20, moves=1),
        total_steps=200,
    )
    energy = inside(allocator).scores.inputs
    assert energy is not None
    for t in range(1, 32):  # 130 - 103 = 27 steps that no score will remember
        train_net(model, allocator.optimizer, allocator, 1, first=t)
        assert allocator.run.observes(t) == (t > 27)
        assert energy.active == allocator.run.observes(t + 1)
        if t <= 27:
            assert all(seen is None for seen in energy.collect())


def test_the_orthogonality_term_is_added_after_the_scores_are_taken(make_net, net_batch):
    results, gradients = [], []
    for weight in (0.0, 0.5):
        model = make_net(trained=True).train()
        allocator = allocate(model, forced(**WINDOW, orth_weight=weight))
        x, y = net_batch(1)
        (model(x) - y).square().mean().backward()
        allocator.before_step()
        results.append(inside(allocator).scores.tensors()["sensitivity"].clone())
        gradient = allocator.layers[0].a.A.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    assert same_bits(results[0], results[1])  # Eq. (3) sees the task's gradient alone
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_input_score_reads_the_weights_before_the_optimizer_step():
    """Eq. (6) by hand, |e| sum_k |A_k| x_k^2 ||B||, of the weights that the gradient belongs to."""
    model: Any = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=2, target_modules=["0"])).train()
    literal: dict[str, Any] = dict(alpha=0.0, beta1=0.0, score_norm="none")
    given = forced(interval=1, initial_warmup=0, final_warmup=1, moves=0, **literal)
    trained = trainable(model)
    allocator = RankAllocator(model, torch.optim.SGD(trained, lr=10.0), total_steps=3, **given)
    (layer,) = allocator.layers
    weights = [[1.0, -2.0], [3.0, 0.0]], [1.0, 0.5], [[3.0, 0.0], [4.0, 1.0]]
    with torch.no_grad():
        for factor, values in zip(layer.factors, weights, strict=True):
            factor.copy_(torch.tensor(values))
    model(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).square().sum().backward()  # mean squares 5 and 2
    record = take_step(allocator)
    assert not any(same_bits(now, torch.tensor(then)) for now, then in zip(layer.factors, weights, strict=True))
    assert record is not None and record["scores"][layer.name] == pytest.approx([(1 * 5 + 2 * 2) * 5, 0.5 * 3 * 5 * 1])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_where_no_gradient_was_finite_nothing_moves(alpha, make_net, net_batch, caplog):
    model = make_net(trained=True)
    allocator, before = allocate(model, forced(**WINDOW, alpha=alpha)), None
    for number in range(1, 7):
        before = before or dict(allocator.ranks)
        (torch.nan * model(net_batch(number)[0])).square().mean().backward()
        allocator.before_step()
        allocator.optimizer.zero_grad()  # as a scaler that skips the step
        allocator.after_step()
    assert allocator.ranks == before and not allocator.history
    assert "nothing is adjusted after step 3: too few steps before it were measured" in caplog.text

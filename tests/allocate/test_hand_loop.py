"""RankAllocator in a hand-written loop: the same training as a Trainer's, and gradients as the loop leaves them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from closeness import same_bits
from transformers import Trainer, get_scheduler
from windows import holds_what_is_trained, inside, on_lora, take_step, trainable

from pedyra import RankAllocator


class Recording(Trainer):
    """Keeps the batches of every micro-step, in the order Trainer drew them."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), {key: value.clone() for key, value in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


def train_by_hand(
    model: Any, given: dict[str, Any], batches: list[Any], *, accumulate: int, clip: float, bf16: bool
) -> Any:
    """The loop of the README, with accumulation, clipping and a learning-rate schedule. Returns its allocator."""
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2, weight_decay=0.0, fused=True)
    steps = len(batches) // accumulate
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    allocator = RankAllocator(model, optimizer, total_steps=steps, **given)
    model.train()
    for index, batch in enumerate(batches, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        (loss / accumulate).backward()
        if index % accumulate:
            continue
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        allocator.before_step()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        allocator.after_step()
    return allocator


@pytest.mark.parametrize(
    ("paper", "accumulate", "clip", "bf16"),
    [
        (False, 1, 0.0, False),
        (False, 1, 0.05, False),
        (True, 1, 0.05, False),
        (False, 2, 0.05, False),
        (False, 1, 0.05, True),
    ],
)
def test_trainer_and_hand_loop_give_the_same_ranks_and_bits(
    paper, accumulate, clip, bf16, make_trainer, make_bert, quick, tmp_path
):
    given = quick(paper=paper)
    trainer, callback = make_trainer(
        tmp_path,
        given,
        trainer_class=Recording,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        bf16=bf16,
    )
    trainer.model_accepts_loss_kwargs = False  # BERT ignores them; so the mean over the micro-batches is Trainer's
    trainer.train()
    model = make_bert()
    allocator = train_by_hand(model, given, trainer.batches, accumulate=accumulate, clip=clip, bf16=bf16)

    def plain(history: list[Any]) -> list[Any]:
        return [{key: value for key, value in record.items() if key != "seconds"} for record in history]

    assert plain(allocator.history) == plain(callback.allocator.history)
    assert allocator.ranks == callback.allocator.ranks
    by_trainer = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, by_trainer[name]), name
    for mine, theirs in zip(allocator.triples(), callback.allocator.triples(), strict=True):
        left, right = allocator.optimizer.state[mine], callback.allocator.optimizer.state[theirs]
        assert all(same_bits(left[key], right[key]) for key in left)


@pytest.fixture
def make_allocator(make_net, quick):
    def make(**settings: Any):
        model = make_net(trained=True)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, RankAllocator(model, optimizer, **quick(**settings), total_steps=12)

    return make


def test_a_grad_scaler_changes_nothing_when_gradients_are_unscaled_first(make_allocator, net_batch, train_net):
    """Scaling by a power of two is exact, so the run with a scaler equals the run without, bit for bit."""
    model, optimizer, allocator = make_allocator()
    train_net(model, optimizer, allocator, 12)

    scaled_model, optimizer, scaled = make_allocator()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_model.train()
    for step in range(1, 13):
        x, y = net_batch(step)
        scaler.scale((scaled_model(x) - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        scaled.before_step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scaled.after_step()
    assert [r["scores"] for r in scaled.history] == [r["scores"] for r in allocator.history]
    assert scaled.ranks == allocator.ranks
    assert all(same_bits(*pair) for pair in zip(scaled.triples(), allocator.triples(), strict=True))


def test_a_step_that_the_scaler_skips_is_counted_and_leaves_scores_and_weights_alone(make_allocator, net_batch):
    model, optimizer, allocator = make_allocator(alpha=0.3)  # with Eq. (3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    model.train()
    for step in range(1, 13):
        x, y = net_batch(step)
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * float("inf") if step == 4 else loss).backward()
        scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in allocator.triples()], inside(allocator).scores.tensors()["sensitivity"]
        allocator.before_step()
        if step == 4:
            assert same_bits(inside(allocator).scores.tensors()["sensitivity"], before[1])
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            assert all(same_bits(*pair) for pair in zip(allocator.triples(), before[0], strict=True))
        optimizer.zero_grad()
        allocator.after_step()
    assert scaler.get_scale() == 1.0
    assert [record["skipped_steps"] for record in allocator.history] == [0, 1, 1]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_loss_kept_from_the_step_before_an_adjustment_does_not_disturb_the_next_one(make_allocator, net_batch):
    """A loop usually still holds the last loss, and with it the old graph, when ranks have changed."""
    model, optimizer, allocator = make_allocator()
    model.train()
    kept = []
    for step in range(1, 13):
        x, y = net_batch(step)
        kept.append((model(x) - y).square().mean())
        kept[-1].backward(retain_graph=True)
        take_step(allocator)
        assert holds_what_is_trained(optimizer, model)
    assert any(record["pruned"] for record in allocator.history)


def test_a_loop_that_forgets_half_of_the_allocator_is_told(make_net, net_batch):
    def loss(model: Any) -> Any:
        x, y = net_batch(1)
        return (model(x) - y).square().mean()

    model = make_net()
    allocator = RankAllocator(model, torch.optim.Adam(model.parameters()), on_lora(interval=4, final_warmup=4), 20)
    loss(model).backward()
    with pytest.raises(ValueError, match=r"after_step\(\) without before_step\(\) in step 1"):
        allocator.after_step()
    model = make_net()
    allocator = RankAllocator(model, torch.optim.Adam(model.parameters()), on_lora(interval=4, final_warmup=4), 20)
    loss(model).backward()
    allocator.before_step()
    with pytest.raises(ValueError, match=r"before_step\(\) was called twice in step 1; call after_step\(\)"):
        allocator.before_step()


def test_a_loop_that_counts_micro_batches_is_told_once(make_net, train_net, caplog):
    caplog.set_level(logging.WARNING, "pedyra.allocate.rank_allocator")  # the command line's silence, of another test
    model = make_net()
    optimizer = torch.optim.Adam(trainable(model))
    allocator = RankAllocator(model, optimizer, on_lora(interval=4, final_warmup=4), 20)
    train_net(model, optimizer, allocator, 20)
    assert not [record for record in caplog.records if "a run of 20" in record.message]
    train_net(model, optimizer, allocator, 5, first=21)
    told = [record.message for record in caplog.records if "a run of 20" in record.message]
    assert len(told) == 1 and "step 21 of a run of 20" in told[0]

"""Two processes on halves of every batch, their gradients averaged, decide what one process on the whole batch does."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from together import can_fork, together
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from windows import forced, on_lora, take_step, trainable
from works_with import note

from pedyra import RankAllocator, adapt
from pedyra.allocate.distributed import wrap_again

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")

KEPT = ("step", "ranks", "pruned", "added", "scores")


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {"config": on_lora(**settings)}


def ending(model: nn.Module, allocator: RankAllocator) -> dict[str, Any]:
    """Return what a process ends with, as plain values."""
    weights = [value.flatten().tolist() for name, value in model.state_dict().items() if "lora" in name]
    updates = [(x.scaling * (x.b.weight * x.a.E) @ x.a.A).flatten().tolist() for x in allocator.layers]
    return {"weights": weights, "updates": updates, "history": [{k: r.get(k) for k in KEPT} for r in allocator.history]}


def by_hand(rank: int, size: int, settings: dict[str, Any], way: str = "plain") -> dict[str, Any]:
    """The README's loop, 24 steps; in other ways than "plain" with a hook of communication, and a "static graph", or
    two micro-batches, of which the first is not averaged ("no_sync"; torch cannot do both)."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 6))
    teacher = torch.randn(8, 6)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))
    trained = trainable(model)
    # Of SGD a difference of a rounding stays one; Adam makes a step of it where a gradient is nearly zero.
    optimizer = torch.optim.SGD(trained, lr=0.2, momentum=0.5)
    allocator = RankAllocator(model, optimizer, total_steps=24, **given(settings))
    hooked, sent = way != "plain", []

    def hook(state, bucket):  # torch looks at its annotations
        state.append(bucket.buffer().numel())
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

    wrapped: Any = DistributedDataParallel(model, static_graph=way == "static graph") if size > 1 else model
    if hooked and size > 1:
        wrapped.register_comm_hook(sent, hook)
    for step in range(24):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        part = x.chunk(size)[rank]
        batches = part.chunk(2) if way == "no_sync" else [part]
        trained_numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for index, batch in enumerate(batches):
            alone = size > 1 and index + 1 < len(batches)
            with wrapped.no_sync() if alone else nullcontext():
                loss = (wrapped(batch) - torch.tanh(batch @ teacher)).square().mean()
                (loss / len(batches)).backward()
        assert not (hooked and size > 1) or sum(sent) == trained_numbers  # once a step, and all that is trained
        sent.clear()
        record = take_step(allocator)
        if size > 1 and record and (record["pruned"] or record["added"]):
            if hooked:
                wrap_again(wrapped, init_sync=False)
            else:
                wrapped = DistributedDataParallel(model, init_sync=False)
    return ending(model, allocator)


def by_trainer(rank: int, size: int, settings: dict[str, Any], out: str, resume: bool = False) -> dict[str, Any]:
    """A classifier, 24 steps."""
    torch.manual_seed(2)
    shape: Any = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = BertForSequenceClassification(BertConfig(**shape))
    lora = LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value", "dense"])  # type: ignore[arg-type]
    model: Any = get_peft_model(base, lora)
    draw = torch.Generator().manual_seed(7)
    tokens = [torch.randint(3, 40, (6,), generator=draw) for _ in range(64)]
    rows: Any = [dict(input_ids=row, attention_mask=torch.ones_like(row), labels=int(row[0] > 20)) for row in tokens]
    arguments = TrainingArguments(
        out, max_steps=24, per_device_train_batch_size=8 // size, learning_rate=0.5, optim="sgd", use_cpu=True,
        lr_scheduler_type="constant", max_grad_norm=1.0, report_to="none", save_steps=11, logging_steps=5, seed=5,
        disable_tqdm=True, ddp_backend="gloo" if size > 1 else None,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.model_accepts_loss_kwargs = False  # BERT's loss is a mean of its own
    handle = adapt(trainer, given(settings)["config"], record_to=f"{out}/ranks.jsonl")
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-11" if resume else None)
    assert handle.allocator is not None
    return ending(model, handle.allocator)


def synced(rank: int, size: int, settings: dict[str, Any], out: str) -> tuple[int, int]:
    """Count how often the whole model is sent in a Trainer's run, and how often triples move in it."""
    import torch.nn.parallel.distributed as ddp

    calls, sync = [], ddp._sync_module_states

    def counting(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        sync(*args, **kwargs)

    ddp._sync_module_states = counting
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*broadcast_buffers", FutureWarning)  # a setting that has another name by now
        history = by_trainer(rank, size, settings, out)["history"]
    return len(calls), sum(bool(record["pruned"] or record["added"]) for record in history)


def test_the_whole_model_is_sent_when_training_begins_and_at_no_move(tmp_path: Path):
    for sent, moved in together(synced, 2, PAPER, str(tmp_path)):
        assert sent == 2 and moved  # accelerate's wrapper, and the one after the allocator is there


def misused(rank: int, size: int) -> dict[str, int | None]:
    """Way to use DDP -> the step after which it is refused."""
    dist.init_process_group("gloo")
    ways = "never wrapped", "wrapped too early", "not wrapped again", "as it should be"
    return {way: first_told(way, rank) for way in ways}


def first_told(way: str, rank: int) -> int | None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if way == "wrapped too early" else None
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    settings = forced(interval=12, initial_warmup=0, final_warmup=3, moves=3)
    allocator = RankAllocator(model, optimizer, total_steps=24, **settings)
    if wrapped is None:
        wrapped = model if way == "never wrapped" else DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(1, 15):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + rank))
        wrapped(x).square().mean().backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        try:
            record = allocator.after_step()
        except ValueError as told:
            assert "gradients are not averaged" in str(told) and len(str(told)) < 300
            return step
        if record and way == "as it should be":
            wrapped = DistributedDataParallel(model)
    return None


PAPER: dict[str, Any] = dict(interval=4, initial_warmup=2, final_warmup=6, moves=3, budget="ranks")


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def assert_the_same_decisions(together: dict[str, Any], alone: dict[str, Any]) -> None:
    assert any(record["pruned"] for record in alone["history"]), "nothing moved: it proves nothing"
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        for key in ("step", "ranks", "added"):
            assert ours[key] == theirs[key]
        assert flat(ours["scores"]) == pytest.approx(flat(theirs["scores"]), rel=2e-3, abs=1e-5)
    # A triple that is turned may be -a and -b as well: the update is the same.
    assert flat(together["updates"]) == pytest.approx(flat(alone["updates"]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("way", ["plain", "static graph", "no_sync"])
def test_two_processes_decide_as_one_does_on_the_whole_batch(way):
    (alone,) = together(by_hand, 1, PAPER)
    first, second = together(by_hand, 2, PAPER, way)
    assert first == second  # to the last bit
    assert_the_same_decisions(first, alone)


def test_processes_that_train_apart_are_told_how_to_train_together():
    # Made after the wrapper, the allocator has renewed E alone, which the wrapper does not know.
    expected = {"never wrapped": 1, "wrapped too early": 12, "not wrapped again": 13, "as it should be": None}
    assert together(misused, 2) == [expected, expected]


def test_a_penalty_weighs_the_same_whatever_the_number_of_processes(tmp_path):
    settings = {**PAPER, "orth_weight": 0.3}
    (alone,) = together(by_trainer, 1, settings, str(tmp_path / "one"))
    first, second = together(by_trainer, 2, settings, str(tmp_path / "two"))
    assert first == second
    assert_the_same_decisions(first, alone)


def test_a_trainer_of_two_processes_trains_as_one_and_resumes(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (alone,) = together(by_trainer, 1, PAPER, one)
    first, second = together(by_trainer, 2, PAPER, two)
    assert first == second
    assert_the_same_decisions(first, alone)
    record = Path(two, "ranks.jsonl").read_text()
    assert len(record.splitlines()) == len(Path(one, "ranks.jsonl").read_text().splitlines())  # one writer
    resumed, _ = together(by_trainer, 2, PAPER, two, True)
    assert resumed["weights"] == first["weights"]
    assert Path(two, "ranks.jsonl").read_text().count("adjustment") == record.count("adjustment")
    (fewer,) = together(by_trainer, 1, PAPER, two, True)  # from what two have saved
    assert_the_same_decisions(fewer, first)
    note("engine", "DDP, two processes", ranks="move", resume="the same bits", fit="works")  # test_fit_processes.py

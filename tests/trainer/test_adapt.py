"""`adapt` of a stock Trainer: what trains, and what is refused before the first step."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from closeness import same_bits
from transformers import BertConfig, BertForSequenceClassification, Trainer
from windows import inside, trainable
from works_with import note

from pedyra import adapt
from pedyra.trainer.adapt import _unscale
from pedyra.trainer.engines import check_engine, data_parallel


def test_an_optimizer_that_is_there_already_trains_the_same(make_trainer, quick, tmp_path, run_state):
    """E then joins the optimizer that Trainer has built without it; the update of a parameter does not change."""
    early, handle = make_trainer(tmp_path)
    early.train()
    late, _ = make_trainer(tmp_path, adapting=None)
    late.create_optimizer()
    other = adapt(late, quick()["config"])
    late.train()
    left, right = run_state(early, handle), run_state(late, other)
    assert left["history"] == right["history"]
    assert all(same_bits(value, right["parameters"][name]) for name, value in left["parameters"].items())


def test_a_second_training_goes_on_from_the_ranks_of_the_first(make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path)
    trainer.train()
    first, ranks, parameters = callback.allocator, callback.allocator.ranks, callback.allocator.parameters
    trainer.train()
    assert callback.allocator is not first
    assert callback.allocator.initial_parameters == parameters
    assert {name: len(scores) for name, scores in callback.allocator.history[0]["scores"].items()} == ranks
    assert [record["step"] for record in callback.allocator.history] == [3, 5, 7]


@pytest.mark.parametrize("partial", [False, True])
def test_a_model_made_anew_by_model_init_is_attached_at_train_begin(
    partial, make_bert, make_trainer, rows, quick, tmp_path
):
    """Trainer counts the arguments of a partial in a way of its own."""
    reference, _ = make_trainer(tmp_path)
    init: Any = functools.partial(lambda r: make_bert(r=r), r=4) if partial else lambda: make_bert()
    trainer = Trainer(model_init=init, args=reference.args, train_dataset=rows)
    handle = adapt(trainer, quick()["config"])
    trainer.train()
    assert handle.allocator is not None
    assert [record["step"] for record in handle.allocator.history] == [3, 5, 7]


def test_bf16_autocast_keeps_the_triples_and_their_scores_in_float32(make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path, bf16=True)
    trainer.train()
    assert {p.dtype for p in callback.allocator.triples()} == {torch.float32}
    scores = inside(callback.allocator).scores.tensors()
    assert {value.dtype for value in scores.values() if value.is_floating_point()} == {torch.float32}
    assert any(record["pruned"] for record in callback.allocator.history)


def test_scores_see_the_gradients_that_the_optimizer_takes(make_trainer, quick, tmp_path):
    """With clipping at c, the norms of all adapted gradients lie within c; without, the same run exceeds it."""

    def norm(limit: float) -> float:
        trainer, callback = make_trainer(tmp_path, quick(interval=3, final_warmup=1), max_grad_norm=limit, max_steps=6)
        trainer.train()
        return float(inside(callback.allocator).scores.norms.norm())

    assert norm(1e-3) <= 1e-3 * (1 + 1e-5)
    assert norm(0.0) > 1e-3


def test_unscaling_happens_once_whether_or_not_clipping_did_it(make_net):
    model = make_net(trained=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerated = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    x = torch.randn(2, 8)
    scaler.scale(model(x).sum()).backward()
    scaled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for _ in range(2):
        _unscale(accelerated)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(same_bits(grad * 1024, before) for grad, before in zip(grads, scaled, strict=True))


# What is refused, before the first step and with the repair in the message.


def test_what_cannot_be_adapted_is_told_at_once(make_trainer, quick, tmp_path):
    config = BertConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    plain, _ = make_trainer(tmp_path, adapting=None, model=BertForSequenceClassification(config))
    method = quick()["config"]
    trainer, _ = make_trainer(tmp_path)
    begun, _ = make_trainer(tmp_path, adapting=None)
    begun.state.global_step = 12
    unadapted, _ = make_trainer(tmp_path, adapting=None)
    named = {"adapter": "second"}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (plain.model, {}, "adapt takes a Trainer of transformers or TRL, and BertForSequenceClassification is none"),
        (plain, {}, "no LoRA adapter named 'default'; wrap it with peft.get_peft_model"),
        (unadapted, named, "no LoRA adapter named 'second'"),
        (trainer, {}, "this Trainer is adapted already; call adapt once"),
        (begun, {}, r"training has begun \(12 steps\).*call adapt before train"),
    ]
    for given, more, message in cases:
        with pytest.raises(ValueError, match=message):
            adapt(given, method, **more)


def test_what_the_allocator_refuses_is_told_before_the_first_step(make_trainer, quick, tmp_path):
    trainer, _ = make_trainer(tmp_path, quick(interval=50))
    with pytest.raises(ValueError, match="no rank could ever move: .*interval 50.*shorten them"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("faked", "message"),
    [
        ({"fsdp": "full_shard"}, "under Trainer's FSDP but for version 2 on an accelerator; see docs/processes.md, or"),
        ({"world_size": 2}, "under 2 processes in a Linear; use DDP, or one process"),
        ({"n_gpu": 2}, "under DataParallel over 2 GPUs; set CUDA_VISIBLE_DEVICES"),
    ],
)
def test_wrappers_in_which_a_resize_would_diverge_are_refused(faked, message):
    args: Any = SimpleNamespace(**{"fsdp": "", "world_size": 1, "n_gpu": 1, **faked})
    with pytest.raises(ValueError, match=message):
        data_parallel(args, torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("deepspeed", "under DeepSpeed; train under DDP.*pedyra fit FOLDER"),
        ("fsdp", "under FSDP1; use fsdp_config={'version': 2}, or DDP.*pedyra fit FOLDER"),
    ],
)
def test_engines_that_would_cut_the_adapter_are_refused_before_they_are_set_up(engine, message):
    plugin = SimpleNamespace(fsdp_version=1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    check_engine(trainer)
    setattr(trainer, f"is_{engine}_enabled", True)
    with pytest.raises(ValueError, match=message):
        check_engine(trainer)
    if engine == "fsdp":
        note(
            "engine",
            "FSDP1",
            ranks="refused: training under FSDP1 (tested with a stand-in)",
            resume="",
            fit="not run here",
        )

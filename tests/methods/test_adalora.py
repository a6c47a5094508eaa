"""PEFT's AdaLoRA: called at the right moments, and its crashes told before they happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from together import can_fork, together
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import pedyra
from pedyra.app.runs.setup import layer_rows
from pedyra.lora.inspection import inspect_adapter


def active(model: Any) -> int:
    """Triples whose E is not masked."""
    return sum(int(p.count_nonzero()) for name, p in model.named_parameters() if "lora_E" in name)


def test_a_run_ends_at_the_budget(prepare: Any):
    run = prepare("adalora")
    layers = sum("lora_E" in name for name, _ in run.model.named_parameters())
    run.train()
    assert active(run.model) == 4 * layers
    config = run.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.deltaT, config.tfinal) == (12, 2, 2, 3)


def test_the_ranks_that_are_told_are_those_that_are_saved(prepare: Any, tmp_path: Path):
    run = prepare("adalora")
    whole = layer_rows(run.model)
    run.train()
    rows = layer_rows(run.model)
    run.model.save_pretrained(tmp_path)
    saved = {row["layer"]: row["rank"] for row in inspect_adapter(tmp_path)[:-1]}
    assert {row["layer"]: row["rank"] for row in rows} == saved
    assert sum(row["rank"] for row in rows) < sum(row["rank"] for row in whole)
    before = {row["layer"]: row for row in whole}
    for row in rows:  # each rank of a layer has as many parameters as the others
        assert row["parameters"] * before[row["layer"]]["rank"] == before[row["layer"]]["parameters"] * row["rank"]


def test_the_allocator_sees_each_step_once_after_the_optimizer(prepare: Any, monkeypatch: pytest.MonkeyPatch):
    run = prepare("adalora", training={"gradient_accumulation_steps": 2, "max_steps": 12})
    seen: list[int] = []
    allocate = run.model.base_model.update_and_allocate
    monkeypatch.setattr(
        run.model.base_model, "update_and_allocate", lambda step: (seen.append(step), allocate(step))[1]
    )
    run.train()
    assert seen == list(range(1, 13))


def test_a_step_that_a_grad_scaler_skips_does_not_stop_the_pruning(prepare: Any):
    class Overflow(TrainerCallback):
        """Before the method's own callback: infinite gradients at the first step, of which no step was made."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                for parameter in kwargs["model"].parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("inf"))
            kwargs["optimizer"]._is_overflow = state.global_step == 0
            type(kwargs["optimizer"]).step_was_skipped = property(lambda self: self._is_overflow)

    run = prepare("adalora")
    run.trainer.callback_handler.callbacks.insert(0, Overflow())
    layers = sum("lora_E" in name for name, _ in run.model.named_parameters())
    run.train()
    assert active(run.model) == 4 * layers


class StopAfterOne(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = True
        return control


def test_micro_batches_do_not_multiply_the_penalty(prepare: Any):
    norms = []
    for accumulation in (1, 4):
        run = prepare("adalora", "causal_lm", training={
            "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation,
            "logging_steps": 1,
        })  # fmt: skip
        for name, parameter in run.model.named_parameters():  # E is 0 at first: what is left is the penalty's gradient
            parameter.requires_grad_("lora_A" in name or "lora_B" in name)
        run.model.base_model.update_and_allocate = lambda step: None
        run.trainer.add_callback(StopAfterOne())
        run.trainer.train()
        norms.append(run.trainer.state.log_history[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def first_step(rank: int, size: int, folder: str) -> float:
    """The length of the first step of A and B by plain gradient descent at a rate of 1: with E = 0 all of it is the
    penalty's. Each step has the same eight rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    schedule: Any = {"interval": 2, "initial_warmup": 1, "final_warmup": 2}
    lora = AdaLoraConfig(
        init_r=3, target_r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", orth_reg_weight=0.1, total_step=8
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    args = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8 // size, learning_rate=1.0, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        ddp_backend="gloo" if size > 1 else None,
    )  # fmt: skip
    before = [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[StopAfterOne()])  # type: ignore[arg-type]
    pedyra.adapt(trainer, pedyra.AdaLora(**schedule))
    trainer.train()
    after = [p.detach() for name, p in model.named_parameters() if "lora_A" in name]
    return float(sum((new - old).square().sum() for old, new in zip(before, after, strict=True))) ** 0.5


@pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
def test_processes_do_not_multiply_the_penalty(tmp_path: Path):
    (alone,) = together(first_step, 1, str(tmp_path))
    for each in together(first_step, 2, str(tmp_path)):
        assert alone > 0 and each == pytest.approx(alone, rel=1e-4)


def test_without_the_penalty_peft_is_given_a_weight_above_zero(prepare: Any):
    """peft 0.19 refuses 0 in any forward with labels."""
    run = prepare("adalora", settings={"orth_weight": 0.0})
    weights: list[float] = []

    def forward(*_: Any) -> None:
        weights.append(run.model.peft_config["default"].orth_reg_weight)

    run.model.get_base_model().bert.register_forward_hook(forward)
    run.train()
    assert len(weights) >= 12 and all(0 < weight < 1e-100 for weight in weights)


def test_an_evaluation_loss_has_no_penalty(prepare: Any):
    run = prepare("adalora", settings={"orth_weight": 0.3})
    batch = run.batch()
    run.model.eval()
    loss = run.model(**batch).loss
    logits = run.model(**batch).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch["labels"]))
    run.model.train()
    assert run.model(**batch).loss > loss + 0.1
    assert run.model.peft_config["default"].orth_reg_weight == 0.3


def test_it_may_start_at_the_budget_and_end_below_it(prepare: Any):
    run = prepare("adalora", settings={"final_rank": 2})
    layers = sum("lora_E" in name for name, _ in run.model.named_parameters())
    assert sum(p.shape[0] for name, p in run.model.named_parameters() if "lora_E" in name) == 4 * layers
    run.train()
    assert active(run.model) == 2 * layers

"""A loss that is a mean counts once a step, whatever the number of micro-batches; one divided by all tokens is left."""

from __future__ import annotations

import logging
import pickle
from contextlib import nullcontext

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pedyra import adapt
from pedyra.trainer.changes import expect_mean_loss


def test_micro_batches_of_a_classifier_give_the_gradient_of_one_batch(make_trainer, tmp_path, caplog):
    norms = []
    for accumulation in (1, 4):
        trainer, _ = make_trainer(
            tmp_path / str(accumulation), logging_strategy="steps", logging_steps=1,
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        assert trainer.model_accepts_loss_kwargs
        with caplog.at_level(logging.WARNING, logger="pedyra"):
            trainer.train()
        assert not trainer.model_accepts_loss_kwargs
        norms.append(trainer.state.log_history[0]["grad_norm"])
        hooks = {**trainer.model._forward_hooks, **trainer.model._forward_pre_hooks}  # type: ignore[union-attr]
        assert not any("FirstForward" in str(hook) for hook in hooks.values())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert caplog.text.count("By itself Trainer would multiply it by up to 4") == 1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_where_a_compiled_model_hides_it_a_warning_asks(accumulation, make_trainer, tmp_path, caplog):
    trainer, _ = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.args.torch_compile = True
    with caplog.at_level(logging.WARNING, logger="pedyra"):
        assert expect_mean_loss(trainer, trainer.model) is None
    assert ("model_accepts_loss_kwargs = False" in caplog.text) == (accumulation > 1)


def test_a_language_model_that_divides_by_all_tokens_goes_on_doing_so(make_llama, quick, tmp_path):
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(make_llama(), arguments, train_dataset=rows)  # type: ignore[arg-type]
    adapt(trainer, quick(final_warmup=1)["config"])
    trainer.train()
    assert trainer.model_accepts_loss_kwargs


class OwnMean(Trainer):
    """Computes a mean itself, as the one with class weights in docs/works_with.md."""

    def compute_loss(self, model, inputs, return_outputs=False, **others):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_mean_of_the_trainers_own_is_averaged_where_it_says_so(make_trainer, tmp_path):
    """By the line that docs/works_with.md has; else Trainer adds up those of the micro-batches."""
    norms = []
    for accumulation, told in ((1, True), (4, True), (4, False)):
        trainer, _ = make_trainer(
            tmp_path / f"{accumulation}{told}", trainer_class=OwnMean, logging_strategy="steps", logging_steps=1,
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        if told:
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(4 * norms[0], rel=1e-4)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_trainer_with_a_loss_of_its_own_leaves_no_hook(interrupted, make_trainer, tmp_path):
    """It gives the model no labels; a hook would hold the Trainer, and its optimizer, as long as there is the model."""

    class Stopped(OwnMean):
        def compute_loss(self, *args, **kwargs):
            if interrupted and self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer, _ = make_trainer(tmp_path, trainer_class=Stopped)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        trainer.train()
    model = trainer.model
    assert model is not None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_model_can_be_sent_to_a_worker_that_loads_data(make_trainer, tmp_path):
    """As a collator that holds the model is, before the first forward."""

    class Sent(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            pickle.loads(pickle.dumps(model))
            control.should_training_stop = True

    trainer, _ = make_trainer(tmp_path)
    trainer.add_callback(Sent())
    trainer.train()

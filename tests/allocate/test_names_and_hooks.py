"""What users take from a model, or hang on it: weights by name, hooks; and a run that goes on without pedyra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import TrainerCallback

LORA: dict[str, Any] = {"train_e": False, "moves": 8}
"""Ranks move, and E stays 1, as with the defaults."""


def test_the_parameters_are_named_as_those_of_a_lora(make_trainer, make_bert, quick, logits, tmp_path):
    expected = {name for name, p in make_bert().named_parameters() if p.requires_grad}
    trainer, callback = make_trainer(tmp_path / "run", quick(**LORA))
    trainer.train()
    assert len(set(callback.allocator.ranks.values())) > 1
    model = trainer.model
    taken = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(taken) == expected
    adapter = {name: p.detach().clone() for name, p in taken.items() if "lora_" in name}
    model.save_pretrained(
        tmp_path / "by_name", state_dict=adapter | {n: p for n, p in taken.items() if "lora_" not in n}
    )
    loaded = PeftModel.from_pretrained(make_bert().unload(), str(tmp_path / "by_name"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


def test_the_best_weights_can_be_kept_by_name_across_moves(make_trainer, quick, logits, tmp_path):
    best: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                model = kwargs["model"]
                best["weights"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
                best["logits"], best["ranks"] = logits(model), callback.allocator.ranks

    trainer, callback = make_trainer(tmp_path / "run", quick(**LORA))
    trainer.add_callback(Keep())
    trainer.train()
    model: Any = trainer.model
    assert callback.allocator.ranks != best["ranks"]
    result = model.load_state_dict(best["weights"], strict=False)
    assert not result.unexpected_keys and not any("lora_" in key for key in result.missing_keys)
    torch.testing.assert_close(logits(model), best["logits"], atol=1e-6, rtol=0)
    # And what is saved then is what was loaded, under the names of a LoRA.
    assert all(key.endswith((".weight", ".bias")) for key in get_peft_model_state_dict(model))


def test_hooks_and_attributes_of_a_parameter_go_on_to_its_successor(make_trainer, make_bert, quick, tmp_path):
    model = make_bert()
    trainer, callback = make_trainer(tmp_path / "run", quick(**LORA), model=model, max_grad_norm=0.0)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    after: list[torch.Tensor] = []
    for parameter in factors:
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))
        parameter.register_post_accumulate_grad_hook(after.append)
        parameter.tag = "mine"
    largest: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [p.grad for p in callback.allocator.triples() if p.grad is not None]
            largest.append(max(float(gradient.abs().max()) for gradient in gradients))

    trainer.add_callback(Look())
    trainer.train()
    now = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {id(p) for p in now} != {id(p) for p in factors}
    assert max(largest) == pytest.approx(1e-4) and len(after) == 12 * len(factors)
    assert all(p.tag == "mine" for p in now)

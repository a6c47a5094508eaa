"""load_best_model_at_end across resizes: the ranks, factors and logits of the best checkpoint come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback


class Scripted:
    """compute_metrics whose best value comes at the second evaluation."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        return {"score": 1.0 if self.calls == 2 else 0.0}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_score",
}


@pytest.mark.parametrize(
    ("rank", "lora"),
    [
        ({}, {}),
        ({}, {"use_dora": True}),
        ({}, {"init_lora_weights": "pissa"}),
        ({"min_rank": 0, "moves": 7}, {}),
    ],
    ids=["plain", "DoRA", "PiSSA", "rank 0"],
)
def test_the_best_model_comes_back_with_its_own_ranks(rank, lora, make_trainer, make_bert, quick, logits, tmp_path):
    """The best checkpoint, of step 4, has other ranks than the last; it can be saved and trained on."""
    seen: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            layers = callback.allocator.layers
            factors = {layer.name: (layer.a.A.clone(), layer.a.E.clone(), layer.b.weight.clone()) for layer in layers}
            seen[state.global_step] = callback.allocator.ranks, logits(kwargs["model"]), factors

    trainer, callback = make_trainer(tmp_path / "run", quick(**rank), lora=lora, **BEST)
    trainer.add_callback(Keep)
    trainer.compute_metrics = Scripted()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    ranks, expected, factors = seen[4]
    assert ranks != seen[12][0]
    assert callback.allocator.ranks == ranks
    for layer in callback.allocator.layers:
        live = (layer.a.A, layer.a.E, layer.b.weight)
        assert all(same_bits(*pair) for pair in zip(live, factors[layer.name], strict=True))
    assert same_bits(logits(trainer.model), expected)

    trainer.model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(3)
    stock = PeftModel.from_pretrained(make_bert().unload(), tmp_path / "adapter")
    assert (logits(stock) - expected).abs().max() < 1e-5

    trainer.train()
    assert [record["step"] for record in callback.allocator.history] == [3, 5, 7]


def test_the_best_of_a_named_adapter_comes_back_whole(make_trainer, make_bert, quick, logits, tmp_path):
    """PEFT saves it in a folder of its own, where Trainer does not look; the head belongs to it."""
    expected: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            expected[state.global_step] = logits(kwargs["model"])

    config = LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = get_peft_model(make_bert().unload(), config, adapter_name="mine")
    trainer, callback = make_trainer(tmp_path, model=model, adapting={"adapter": "mine"}, **BEST)
    trainer.add_callback(Keep)
    trainer.compute_metrics = Scripted()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert same_bits(logits(trainer.model), expected[4]) and not same_bits(expected[4], expected[12])
    assert all(parameter.requires_grad for layer in callback.allocator.layers for parameter in layer.a.parameters())

"""What peft does to an adapter while it trains: switched off and on (preference losses), named, frozen in part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from torch import nn
from windows import take_step, trainable

from pedyra import PeDyra, RankAllocator
from pedyra.lora.attach import attach
from pedyra.lora.layer import adapted_layers

MOVING: dict[str, Any] = dict(interval=4, initial_warmup=0, final_warmup=4, moves=2)


def allocate(model: Any, config: PeDyra, steps: int = 20) -> RankAllocator:
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    return RankAllocator(model, optimizer, config, total_steps=steps)


def test_a_reference_pass_without_the_adapter_changes_nothing(make_net, net_batch):
    """DPO and its like call `disable_adapter` in every step; leaving it makes peft's Parameters trainable."""
    results = []
    for reference in (False, True):
        model = make_net()
        allocator = allocate(model, PeDyra.as_published(**MOVING))
        held = len(allocator.optimizer.param_groups[0]["params"])
        for step in range(1, 21):
            x, y = net_batch(step)
            if reference:
                with model.disable_adapter(), torch.no_grad():
                    model(x)
            (model(x) - y).square().mean().backward()
            take_step(allocator)
        assert len(allocator.optimizer.param_groups[0]["params"]) == held
        results.append((allocator, [p.detach().clone() for p in allocator.triples()]))
    (plain, before), (switched, after) = results
    assert plain.ranks == switched.ranks and any(record["pruned"] for record in plain.history)
    assert all(same_bits(one, two) for one, two in zip(before, after, strict=True))


def test_a_named_adapter_resumes_as_the_unbroken_run(make_trainer, make_bert, quick, tmp_path):
    """Trainer makes a named adapter active, and its Parameters trainable, before it builds the optimizer."""

    def trainer(folder: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        base = make_bert().unload()
        torch.manual_seed(5)
        config = LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value"])
        model = get_peft_model(base, config, adapter_name="mine")
        rank = quick(kind=PeDyra)
        adapting = {"adapter": "mine"}
        return make_trainer(folder, rank, model=model, adapting=adapting, save_strategy="steps", save_steps=4)[0]

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    pairs = zip(adapted_layers(whole.model, "mine"), adapted_layers(resumed.model, "mine"), strict=True)
    for one, two in pairs:
        assert one.rank == two.rank and same_bits(one.a.A, two.a.A) and same_bits(one.b.weight, two.b.weight)


def freeze_second(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "layer.0" in name and "query" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("paper", [False, True])
def test_a_run_with_a_frozen_layer_resumes_and_brings_back_its_best(paper, make_trainer, make_bert, quick, tmp_path):
    settings = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4)
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = freeze_second(make_bert())
        frozen = attach(model, start="svd" if paper else "lora")[0]
        assert "query" in frozen.name and not frozen.a.A.requires_grad
        before = frozen.a.E.detach().clone()
        trainer, _ = make_trainer(
            tmp_path, quick(paper=paper), model=model, load_best_model_at_end=True, metric_for_best_model="loss",
            **settings,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert same_bits(adapted_layers(model)[0].a.E, before) and frozen.rank == 3  # E of a frozen layer is frozen
        runs.append([p.detach().clone() for layer in adapted_layers(model) for p in (layer.a.A, layer.b.weight)])
    assert all(same_bits(one, two) for one, two in zip(*runs, strict=True))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mha(x, x, x)[0])


def test_attention_whose_slots_peft_never_calls_is_refused_and_can_be_left_out():
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(Attending(), LoraConfig(r=2, target_modules=["mha", "out"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mha: MultiheadAttention .*exclude_modules=.'mha', 'mha.out_proj'"):
        attach(model)
    config = LoraConfig(r=2, target_modules=["mha", "out"], exclude_modules=["mha", "mha.out_proj"])
    left: Any = get_peft_model(Attending(), config)  # type: ignore[arg-type]
    assert [layer.name for layer in attach(left)] == ["out"]


def test_checkpoints_of_a_search_for_hyperparameters_have_their_side_files(make_trainer, tmp_path, monkeypatch):
    trainer, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    inner = type(trainer)._get_output_dir
    monkeypatch.setattr(type(trainer), "_get_output_dir", lambda self, trial: f"{inner(self, trial)}/run-0")
    trainer.train()
    assert (tmp_path / "run-0" / "checkpoint-6" / "pedyra_state.json").is_file()
    assert not (tmp_path / "checkpoint-6").exists()

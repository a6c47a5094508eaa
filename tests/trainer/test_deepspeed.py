"""DeepSpeed's ZeRO-2 and ZeRO-3: PE-DyRA is refused at the start, and a LoRA that was trained there is fitted from its
folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from together import can_fork, together
from trainer_cases import LORA, base, make_trainer
from transformers import LlamaForSequenceClassification
from works_with import note

import pedyra
from pedyra import PeDyra, adapt

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator"),
    pytest.mark.filterwarnings("ignore"),
]


def trained(rank: int, size: int, stage: int, out: str) -> str:
    """Return what `adapt` says; then plain LoRA is trained to the end."""
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}  # else ZeRO-3 saves no adapter
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    settings: dict[str, Any] = dict(deepspeed=config, label_smoothing_factor=0.2, max_steps=6, ddp_backend="gloo")
    case, told = "Trainer, label smoothing", ""
    # Made before DeepSpeed's settings are: from then on transformers would cut every model that it makes.
    lora: Any = LoraConfig(**LORA, task_type="SEQ_CLS")  # type: ignore[arg-type]
    model = get_peft_model(base(LlamaForSequenceClassification, num_labels=2), lora)
    try:
        adapt(make_trainer(case, Path(out), model=model, **settings), PeDyra.as_published(interval=2))
    except ValueError as error:
        told = str(error)
    trainer = make_trainer(case, Path(out), model=model, **settings)
    trainer.train()
    trainer.save_model(f"{out}/adapter")
    return told


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_are_refused_and_the_adapter_is_fitted_from_its_folder(stage, tmp_path):
    for told in together(trained, 2, stage, str(tmp_path)):
        assert "does not support training under DeepSpeed; train under DDP" in told and "\n" not in told
    model = PeftModel.from_pretrained(
        base(LlamaForSequenceClassification, num_labels=2), tmp_path / "adapter", is_trainable=True
    )
    found = pedyra.fit(make_trainer("Trainer, label smoothing", tmp_path / "fit", model=model), rows=64, tolerance="5%")
    assert found.measure == "loss"
    note(
        "engine",
        f"DeepSpeed ZeRO-{stage}",
        ranks="refused: training under DeepSpeed",
        resume="",
        fit="from the adapter's folder",
    )

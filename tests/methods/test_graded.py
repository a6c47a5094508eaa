"""Graded ranks: E falls from rank to rank, is never trained, and is folded into A on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from safetensors.torch import load_file

from pedyra.lora.layer import lora_layers
from pedyra.methods.graded import grades


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, [1]), (2, [4, 1]), (6, [16, 9, 4, 4, 1, 1]), (8, [16, 9, 4, 4, 1, 1, 1, 1])]
)
def test_a_grade_is_the_square_of_how_many_nested_ranks_hold_it(rank: int, expected: list[float]):
    assert grades(rank).tolist() == expected


def test_what_is_saved_is_e_a_with_e_as_it_was(prepare: Any, tmp_path: Path):
    run = prepare("graded", lora={"r": 4})
    slots = {layer.name: layer.a for layer in lora_layers(run.model, "default")}
    before = {name: slot.A.detach().clone() for name, slot in slots.items()}
    run.train()
    run.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, slot in slots.items():
        assert not same_bits(slot.A, before[name])
        expected = torch.tensor([9.0, 4.0, 1.0, 1.0])[:, None] * slot.A.detach()
        torch.testing.assert_close(saved[f"base_model.model.{name}.lora_A.weight"], expected)


def test_after_a_resume_training_goes_on_as_if_it_had_not_stopped(prepare: Any, tmp_path: Path):
    saving = {"training": {"save_strategy": "steps", "save_steps": 6}, "output_dir": str(tmp_path / "run")}
    whole = prepare("graded", **saving).train()
    resumed = prepare("graded", **saving)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    resumed.adaptation.finish()
    assert same_bits(resumed.logits(), whole.logits())


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init": "pissa"}])
def test_another_start_is_refused(lora: dict[str, Any], prepare: Any):
    with pytest.raises(ValueError, match="graded ranks scale LoRA's own start"):
        prepare("graded", lora=lora)

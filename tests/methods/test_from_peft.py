"""LoRA, PiSSA, DoRA and QLoRA are PEFT's, with what each presupposes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from pedyra.app.runs.setup import begin_method
from pedyra.methods.registry import get_method


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trainable(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora" in name)


@pytest.mark.parametrize("method", ["lora", "adalora", "randlora"])
def test_an_adapter_names_the_revision_of_its_base(method: str, prepare: Any):
    run = prepare("lora")
    lora = LoraConfig(target_modules=["query"], revision="v1")
    model, _ = get_method(method).begin(run.model.unload(), lora, {})
    assert model.peft_config["default"].revision == "v1"


def test_pissa_keeps_the_function_and_trains_no_e(prepare: Any, make_base: Any):
    run = prepare("pissa")
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        expected = base.eval()(**run.inputs()).logits
    torch.testing.assert_close(run.logits(), expected, rtol=1e-4, atol=1e-5)
    assert trainable(run.model) == trainable(prepare("lora").model)


def test_pissa_is_saved_against_the_pristine_weight(prepare: Any, tmp_path: Path):
    run = prepare("pissa").train()
    run.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {8}  # trained minus initial: 2 r


@pytest.mark.parametrize("method", ["lora", "lora+", "dora"])
@pytest.mark.parametrize("init", ["pissa_niter_1", "olora"])
def test_what_is_saved_of_a_start_from_the_weight_is_what_was_trained(
    prepare: Any, make_base: Any, tmp_path: Path, method: str, init: str
):
    run = prepare(method, lora={"init": init}).train()
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        result = loaded(**run.inputs()).logits
    torch.testing.assert_close(result, run.logits(), rtol=1e-4, atol=1e-5)


def test_qlora_is_nf4_unless_the_recipe_says_int8(make_recipe: Any):
    assert make_recipe("qlora").model.quantization == "nf4"
    assert make_recipe("qlora", model={"quantization": "int8"}).model.quantization == "int8"


def test_qlora_refuses_a_model_in_full_precision(make_recipe: Any, make_base: Any):
    base, _, _ = make_base(make_recipe("lora"))
    with pytest.raises(ValueError, match="qlora needs a quantised model; set model.quantization"):
        begin_method(make_recipe("qlora"), base)

"""Every method has a name, trains an encoder and a decoder, and leaves an adapter that PEFT loads by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import PeftModel

from pedyra.methods.names import NAMES
from pedyra.methods.registry import METHODS, get_method


def test_the_names_are_those_of_the_methods_in_their_order():
    assert tuple(METHODS) == NAMES


def test_the_names_are_known_without_torch():
    code = "import sys; from pedyra.methods.names import NAMES; print('lora' in NAMES, 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["True", "False"]


@pytest.mark.parametrize(("name", "nearest"), [("adalora_svd", "adalora-svd"), ("pedira", "pedyra")])
def test_an_unknown_name_is_told_with_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"method '{name}' is unknown; did you mean '{nearest}'"):
        get_method(name)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and PEFT's own
@pytest.mark.parametrize("method", METHODS)
def test_a_decoders_adapter_is_loaded_by_stock_peft(method: str, prepare: Any, make_base: Any, tmp_path: Path):
    """`test_smoke_recipe.py` evaluates an encoder's as it was saved."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    run = prepare(method, "causal_lm").train()
    expected = run.logits()
    assert expected.isfinite().all()
    run.model.save_pretrained(tmp_path / "adapter")
    base, _, _ = make_base(run.recipe)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**run.inputs()).logits, expected, rtol=1e-4, atol=1e-4)


REFUSES_4_BIT = {
    "pissa": "the base model is quantised, but PiSSA decomposes the weight before it is quantised and rewrites it; set "
    "model.quantization to none, or use another lora.init (method pissa: method qlora)",
}


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and PEFT's own
@pytest.mark.parametrize("method", METHODS)
def test_on_weights_in_4_bits_a_method_trains_or_says_why_not(method: str, prepare: Any):
    pytest.importorskip("bitsandbytes")
    sections = {"model": {"quantization": "nf4"}}
    if method in REFUSES_4_BIT:
        with pytest.raises(ValueError) as refused:
            prepare(method, **sections)
        assert str(refused.value) == REFUSES_4_BIT[method]
        return
    run = prepare(method, **sections)
    before = run.logits()
    run.train()
    after = run.logits()
    assert after.isfinite().all() and not same_bits(after, before)


@pytest.mark.parametrize("method", ["dylora", "rasa", "sora", "triadaptlora"])
def test_after_a_resume_training_goes_on_as_if_it_had_not_stopped(method: str, prepare: Any, tmp_path: Path):
    sections: dict[str, Any] = {"training": {"save_strategy": "steps", "save_steps": 6}}
    if method == "sora":
        sections["method_settings"] = {"threshold": 0.05}
    whole = prepare(method, **sections)
    whole.trainer.train()
    resumed = prepare(method, **sections)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert same_bits(resumed.logits(), whole.logits())

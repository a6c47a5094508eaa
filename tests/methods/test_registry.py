"""Every method has a name, trains an encoder and a decoder, and leaves an adapter that PEFT loads by itself."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from closeness import same_bits

from pedyra.methods.names import CLASSES, NAMES
from pedyra.methods.registry import METHODS, get_method


def test_the_table_has_every_name_and_a_line_for_each():
    assert tuple(METHODS) == NAMES and set(CLASSES) < set(NAMES)
    assert all(10 < len(entry.summary) < 125 for entry in METHODS.values())


def test_the_names_are_known_without_torch():
    code = "import sys; from pedyra.methods.names import NAMES; print('lora' in NAMES, 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["True", "False"]


@pytest.mark.parametrize(("name", "nearest"), [("adalora_svd", "adalora-svd"), ("pedira", "pedyra")])
def test_an_unknown_name_is_told_with_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"method '{name}' is unknown; did you mean '{nearest}'"):
        get_method(name)


REFUSES_4_BIT = {
    "pissa": r"the base model is quantised, but PiSSA .* set model.quantization to none, or use another lora.init",
    "gora": r"GoRA takes gradients of the frozen weights, and that of .* is torch.uint8; load the model in float32",
}


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and PEFT's own
@pytest.mark.parametrize("method", METHODS)
def test_on_weights_in_4_bits_a_method_trains_or_says_why_not(method: str, prepare: Any):
    pytest.importorskip("bitsandbytes")
    sections = {"model": {"quantization": "nf4"}}
    if method in REFUSES_4_BIT:
        with pytest.raises(ValueError, match=REFUSES_4_BIT[method]):
            prepare(method, **sections)
        return
    run = prepare(method, **sections)
    before = run.logits()
    run.train()
    after = run.logits()
    assert after.isfinite().all() and not same_bits(after, before)

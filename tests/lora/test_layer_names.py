"""The key of a layer in rank_pattern and alpha_pattern is that of this layer alone, by PEFT's own rule."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from pedyra.lora.layer_names import pattern_keys


def test_a_name_that_ends_another_is_anchored():
    assert pattern_keys(["q", "block.q", "k"]) == {"q": "^q", "block.q": "block.q", "k": "k"}


def test_a_key_is_that_of_its_layer_alone_by_pefts_own_rule():
    names = ["enc.q", "enc_q", "q", "a.1.0", "a.100", "a.b.100", "x"]
    keys = pattern_keys(names)
    assert keys["enc_q"] == "enc_q" and keys["x"] == "x"
    patterns = {keys[name]: index for index, name in enumerate(names)}
    for index, name in enumerate(names):
        for order in (list(patterns), list(reversed(patterns))):
            assert patterns[get_pattern_key(order, name)] == index


@pytest.mark.parametrize("letters", ["ab.", "ab.+*?()[]|^$-"])
def test_keys_of_any_names_are_those_of_their_layers_alone(letters):
    draw = random.Random(0)
    for _ in range(300):
        words = {"".join(draw.choice(letters) for _ in range(draw.randint(1, 6))).strip(".") for _ in range(6)}
        names = sorted(word for word in words if word and ".." not in word)
        keys = pattern_keys(names)
        for order in (names, names[::-1]):
            patterns = [keys[name] for name in order]
            assert all(get_pattern_key(patterns, name) == keys[name] for name in names), names


@pytest.mark.parametrize("outer", ["enc", "top"])  # before and after "q" in the sorted file
def test_rank_patterns_of_nested_names_do_not_collide(outer, set_ranks, tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = nn.Linear(6, 6)
            self.add_module(outer, nn.ModuleDict({"q": nn.Linear(6, 6)}))

        def forward(self, x):
            return self.get_submodule(f"{outer}.q")(torch.tanh(self.q(x)))

    model, x = get_peft_model(Nested(), LoraConfig(r=4, target_modules=["q"])), torch.randn(3, 6)
    set_ranks(model, [1, 5])
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(Nested(), tmp_path)
    assert [m.r["default"] for m in loaded.modules() if hasattr(m, "lora_A")] == [1, 5]
    assert torch.allclose(loaded(x), model(x), atol=1e-6)

"""The key of a layer in rank_pattern and alpha_pattern is that of this layer alone, by PEFT's own rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from pedyra.lora.layer_names import pattern_keys


def test_a_key_is_that_of_its_layer_alone_by_pefts_own_rule():
    names = ["q", "block.q", "k", "c++.k", "ccc.k", "layers.1.q", "layers.11.q"]
    keys = pattern_keys(names)
    assert [keys[name] for name in names] == ["^q", "block.q", "^k", r"c\+\+\.k", "ccc.k", "layers.1.q", "layers.11.q"]
    for order in (names, names[::-1]):
        patterns = [keys[name] for name in order]
        assert all(get_pattern_key(patterns, name) == keys[name] for name in names)


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

"""PEFT's hot-swapping into a model that holds triples, one of whose layers is empty."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from pedyra.lora.attach import attach, detach, drop_empty, train_e, write_ranks
from pedyra.lora.resize import install, resized


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def emptied(net, tmp_path):
    """The folder of an adapter whose first layer has lost all of its ranks."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(net, config)  # type: ignore[arg-type]
    layers = attach(model)
    install([(layers[0], resized(layers[0], range(3), None))])
    write_ranks(model)
    model.save_pretrained(tmp_path / "emptied")
    return tmp_path / "emptied", model


@pytest.mark.parametrize("trained", [False, True])
def test_an_emptied_layer_is_swapped_or_it_is_said_what_to_do_first(emptied, tmp_path, trained):
    folder, made = emptied
    detach(made)
    model = PeftModel.from_pretrained(made.unload(), folder)
    x = torch.randn(4, 6)
    expected = model.eval()(x)
    layers = attach(model)
    drop_empty(layers)
    train_e(layers, trained)
    assert layers[0].rank == 0
    hotswap_adapter(model, str(folder), "default")
    if trained:  # lora_A's weight is computed from A and E, and what is written into it is lost
        with pytest.raises(ValueError, match="pedyra.detach"):
            model(x)
    else:
        torch.testing.assert_close(model(x), expected)

"""A folder of ours is an ordinary LoRA: stock PEFT loads it with the same logits; ours takes any rank back."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from pedyra.lora.attach import attach, detach
from pedyra.lora.folder import read_lora, save_adapter, save_lora
from pedyra.lora.layer import adapted_layers
from pedyra.lora.layer_names import rank_fields

FLAVOURS = {
    "plain": {"init_lora_weights": False},
    "rslora": {"init_lora_weights": False, "use_rslora": True},
    "dora": {"init_lora_weights": False, "use_dora": True},
    "bias": {"init_lora_weights": False, "lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}

# PEFT takes the one-dimensional lora_B.bias for a torn shard, in a plain LoRA as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape. [^(]*lora_B.bias:UserWarning")


@pytest.fixture
def base_of(make_net):
    def base() -> Any:
        return make_net().unload()  # the same seed: the same base weights, no adapter

    return base


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("ranks", [[4], [1, 6, 2], [0, 3, 5], [0]], ids=str)
@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
def test_stock_peft_loads_it_with_the_same_logits(flavour, ranks, detached, make_net, set_ranks, base_of, tmp_path):
    model, x = make_net(**FLAVOURS[flavour]).eval(), torch.randn(4, 8)
    set_ranks(model, ranks)
    expected = model(x)
    if detached:
        detach(model)
        assert torch.allclose(model(x), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(base_of(), tmp_path).eval()
    assert type(next(m for m in loaded.modules() if hasattr(m, "lora_A")).lora_A["default"]) is torch.nn.Linear
    assert torch.allclose(loaded(x), expected, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("live", [[4], [7, 1, 2], [0]], ids=str)
def test_a_live_model_takes_any_saved_ranks(flavour, live, make_net, set_ranks, tmp_path):
    # What Trainer does on resume and for load_best_model_at_end.
    source, x = make_net(**FLAVOURS[flavour]).eval(), torch.randn(4, 8)
    set_ranks(source, [1, 6, 3])
    source.save_pretrained(tmp_path)
    model = make_net(**FLAVOURS[flavour]).eval()
    set_ranks(model, live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert [layer.rank for layer in adapted_layers(model)] == [1, 6, 3]
    assert torch.allclose(model(x), source(x), atol=1e-5)


@pytest.mark.parametrize("flavour", ["plain", "dora", "pissa"])
def test_state_dict_round_trip_is_exact(flavour, make_net, set_ranks):
    source, x = make_net(**FLAVOURS[flavour]).eval(), torch.randn(4, 8)
    set_ranks(source, [1, 6, 3])
    model = make_net(**FLAVOURS[flavour]).eval()
    attach(model)
    model.load_state_dict(source.state_dict())
    assert torch.allclose(model(x), source(x), atol=1e-6)
    state, again = source.state_dict(), model.state_dict()
    assert list(again) == list(state) and all(torch.allclose(again[key], state[key], atol=1e-6) for key in state)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merging_gives_the_adapted_models_function(flavour, make_net, set_ranks):
    model, x = make_net(**FLAVOURS[flavour]).eval(), torch.randn(4, 8)
    set_ranks(model, [1, 6, 0])
    expected = model(x)
    assert torch.allclose(model.merge_and_unload(safe_merge=True)(x), expected, atol=1e-5)


def test_a_state_of_other_ranks_that_is_loaded_is_saved_with_its_own(make_net, set_ranks, tmp_path):
    """The best weights of a run, kept in memory and put back at its end."""
    model, x = make_net(), torch.randn(4, 8)
    set_ranks(model, (2, 0, 5))
    best, expected = copy.deepcopy(get_peft_model_state_dict(model)), model(x)
    set_ranks(model, (1, 3, 4))
    set_peft_model_state_dict(model, best)
    assert [layer.rank for layer in adapted_layers(model)] == [2, 1, 5]  # rank 0 is a row of zeros there
    assert torch.allclose(model(x), expected, atol=1e-6)  # A and E are taken apart again
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(make_net().unload(), tmp_path)
    assert torch.allclose(stock(x), expected, atol=1e-6)


def test_nothing_of_ours_is_left_on_a_model_without_triples(make_llama):
    model = make_llama()
    for _ in range(2):
        attach(model)
        attach(copy.deepcopy(model))
        assert len(model._load_state_dict_post_hooks) == 1
        detach(model)
        assert b"pedyra" not in pickle.dumps(model)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_bit_that_was_flipped_is_told_and_a_folder_of_peft_has_no_sums(name, make_net, tmp_path):
    model = make_net(init_lora_weights=False)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    lora = read_lora(tmp_path / "ours")
    save_lora(tmp_path / "again", lora.tensors, lora.config)
    for folder in ("ours", "again", "theirs"):
        file = tmp_path / folder / name
        content = bytearray(file.read_bytes())
        # The last digit of a number, or the lowest bit of one: still a file that can be read.
        content[content.index(b'"r": ') + 5 if name.endswith("json") else -4] ^= 1
        file.write_bytes(content)
    for folder in ("ours", "again"):
        with pytest.raises(ValueError, match=f"{name} does not match SHA256SUMS.*remove SHA256SUMS"):
            read_lora(tmp_path / folder)
        (tmp_path / folder / "SHA256SUMS").unlink()
    if name.endswith("safetensors"):
        assert [read_lora(tmp_path / folder).title for folder in ("ours", "again", "theirs")]


def test_a_reader_that_knows_no_patterns_has_the_largest_rank_and_the_usual_scaling():
    fields = rank_fields({"a": (2, 2.0), "b": (6, 2.0), "c": (6, 0.5)})
    assert (fields["r"], fields["lora_alpha"]) == (6, 12)
    assert fields["rank_pattern"] == {"a": 2, "b": 6, "c": 6}
    assert fields["alpha_pattern"] == {"a": 4, "b": 12, "c": 3}
    alike = rank_fields({"a": (4, 0.1), "b": (4, 0.3 / 3)})  # 0.09999999999999999
    assert (alike["r"], alike["lora_alpha"], alike["rank_pattern"], alike["alpha_pattern"]) == (4, 0.4, {}, {})

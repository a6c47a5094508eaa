"""inspect_adapter: any LoRA folder, from its files alone."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from pedyra.lora.inspection import inspect_adapter


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.fixture
def adapter(tmp_path):
    """Layer 2: two orthonormal triples of equal size; layer 10: one triple and a zero one; a head beside them."""
    tensors = {
        "layer.10.q.lora_A.weight": torch.tensor([[1.0, 0, 0], [0, 0, 0]]),
        "layer.10.q.lora_B.weight": torch.tensor([[2.0, 0], [0, 0]]),
        "layer.2.q.lora_A.weight": torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]),
        "layer.2.q.lora_B.weight": 3 * torch.eye(2),
        "classifier.weight": torch.zeros(2, 3),
    }
    return write_adapter(tmp_path / "adapter", tensors)


def test_ranks_parameters_and_effective_ranks(adapter):
    first, second, total = inspect_adapter(adapter)
    assert (first["layer"], first["rank"], first["parameters"]) == ("layer.2.q", 2, 12)
    assert (second["layer"], second["rank"], second["parameters"]) == ("layer.10.q", 2, 10)
    # Two equal singular values fill rank 2; one alone fills rank 1.
    assert first["effective_rank"] == pytest.approx(2) and second["effective_rank"] == pytest.approx(1)
    assert (total["layer"], total["rank"], total["parameters"], total["other_parameters"]) == ("total", 4, 22, 6)
    assert total["bytes"] == 4 * (22 + 6)


def test_dora_magnitudes_belong_to_their_layer_and_convolutions_are_read_flat(tmp_path):
    tensors = {
        "q.lora_A.weight": torch.ones(1, 4),
        "q.lora_B.weight": torch.ones(3, 1),
        "q.lora_magnitude_vector": torch.ones(3),
        "conv.lora_A.weight": torch.ones(2, 3, 5, 5),
        "conv.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    ranks = {
        row["layer"]: (row["rank"], row["parameters"]) for row in inspect_adapter(write_adapter(tmp_path, tensors))
    }
    assert (ranks["q"], ranks["conv"]) == ((1, 10), (2, 158))


def test_the_adapter_peft_writes_is_read(tmp_path):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=3, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    layer, _ = inspect_adapter(tmp_path)
    assert layer == {"layer": "0", "rank": 3, "parameters": 33, "effective_rank": 0.0}


def cut_short(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


REFUSED = {
    "damaged": (cut_short, "adapter_model.safetensors is damaged"),
    "empty": (emptied, "holds no adapter"),
    "no LoRA": (lambda folder: write_adapter(folder, {"x": torch.ones(1)}, peft_type="IA3"), "type IA3"),
    "an unfinished run": (
        lambda folder: (emptied(folder), (folder / "checkpoint-8").mkdir()),
        "unfinished, try .*checkpoint-8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_whole_lora_is_refused(case, adapter):
    spoil, message = REFUSED[case]
    spoil(adapter)
    with pytest.raises(ValueError, match=message):
        inspect_adapter(adapter)


def test_a_layer_of_rank_0_counts_as_none(tmp_path):
    tensors = {
        "a.lora_A.weight": torch.zeros(1, 4),
        "a.lora_B.weight": torch.zeros(3, 1),
        "b.lora_A.weight": torch.ones(1, 4),
        "b.lora_B.weight": torch.zeros(3, 1),  # rank 1, not trained yet
    }
    first, second, total = inspect_adapter(write_adapter(tmp_path, tensors))
    assert (first["rank"], first["parameters"], second["rank"], second["parameters"]) == (0, 0, 1, 7)
    assert (total["rank"], total["parameters"], total["other_parameters"], total["bytes"]) == (1, 7, 0, 4 * 14)


def test_experts_have_the_rank_of_the_config_and_no_update_in_common(tmp_path):
    shape: dict[str, Any] = dict(vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    get_peft_model(MixtralForCausalLM(MixtralConfig(**shape)), lora).save_pretrained(tmp_path)
    *layers, total = inspect_adapter(tmp_path)
    ours = {row["layer"].split(".")[3]: row["effective_rank"] for row in layers}
    assert ours == {"self_attn": 0.0, "mlp": None}  # not trained yet; and four updates, one for each expert
    assert [row["rank"] for row in layers] == [2, 2, 2] and (total["rank"], total["effective_rank"]) == (6, None)


def test_experts_whose_parameters_have_several_ranks_have_none_that_is_told(tmp_path):
    """As PEFT writes them where it fuses gate_proj and up_proj of a config by itself."""
    tensors = {
        "mlp.experts.lora_A.weight": torch.ones(16, 3),
        "mlp.experts.lora_B.weight": torch.ones(5, 16),
        "q.lora_A.weight": torch.ones(2, 3),
        "q.lora_B.weight": torch.ones(5, 2),
    }
    experts = {"target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {".*\\.gate_up_proj": 4}}
    experts_row, q, total = inspect_adapter(write_adapter(tmp_path, tensors, r=2, **experts))
    assert (experts_row["rank"], q["rank"], total["rank"], total["parameters"]) == (None, 2, None, 144)

"""Each base and kind of LoRA in docs/bases.md: trained across resizes, saved, loaded by PEFT alone, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor
from windows import forced, take_step, trainable

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.models.quantized import keep_weight_layout, quantization_config

hf: Any = transformers
STEPS = 10
SCHEDULE: dict[str, Any] = {"interval": 2, "initial_warmup": 1, "final_warmup": 2, "moves": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1}
PAIRS: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
IDS = {"input_ids": torch.arange(3, 27).reshape(4, 6)}
TWO = {**IDS, "decoder_input_ids": torch.arange(5, 21).reshape(4, 4)}

Base = tuple[Callable[[], Any], dict[str, Tensor]]
BASES: dict[str, Base] = {
    "BERT": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)), IDS),
    "RoBERTa": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)), IDS),
    "DeBERTa-v3": (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **SIZES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True,
                norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
            )  # fmt: skip
        ),
        IDS,
    ),
    "ModernBERT": (
        lambda: hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, attn_implementation="eager")
        ),
        IDS,
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
                pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
            )  # fmt: skip
        ),
        TWO,
    ),
    "BART": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**PAIRS, max_position_embeddings=32)), TWO),
    "Whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**PAIRS, num_mel_bins=8, max_source_positions=6, max_target_positions=16)
        ),
        {"input_features": torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(0)),
         "decoder_input_ids": TWO["decoder_input_ids"]},
    ),
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), IDS),
    "Qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)), IDS),
    "Mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), IDS),
    "Gemma 3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8)), IDS),
    "GPT-2 (Conv1D)": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
        ),
        IDS,
    ),
    "ViT": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                patch_size=4,
            )  # fmt: skip
        ),
        {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))},
    ),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "EVA": {"init_lora_weights": "eva"},
    "dropout": {"lora_dropout": 0.1},
}
BITS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao int8": "torchao"}


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    return BASES[name][0]().eval()


def adapted(base: Any, batch: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(1)
    lora: Any = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "fan_in_fan_out": False, **settings}
    model = get_peft_model(base, LoraConfig(**lora))
    if settings.get("init_lora_weights") == "eva":
        initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    return model


def train(model: Any, batch: dict[str, Tensor]) -> RankAllocator:
    """Ten steps towards random outputs, in which triples move three times."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, **forced(**SCHEDULE))
    wanted = torch.randn_like(model(**batch).logits)
    for _ in range(STEPS):
        (model.train()(**batch).logits - wanted).square().mean().backward()
        take_step(allocator)
    allocator.release()
    return allocator


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


def whole_way(
    base: Any, again: Any, batch: dict[str, Tensor], folder: Path, *, merges: bool = True, **lora: Any
) -> None:
    """Train on `base`, load in stock PEFT on `again`, merge."""
    model = adapted(base, batch, **lora)
    before = logits(model, batch)
    allocator = train(model, batch)
    assert len(allocator.history) == 3 and len(set(allocator.ranks.values())) > 1, "no rank has moved"
    after = logits(model, batch)
    assert (after - before).abs().max() > 1e-2, "nothing was learned"
    model.save_pretrained(folder)
    loaded: Any = PeftModel.from_pretrained(again, str(folder))
    torch.testing.assert_close(logits(loaded, batch), after, atol=1e-4, rtol=1e-4)
    if merges:
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged, batch), after, atol=2e-4, rtol=1e-3)


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return Int8WeightOnlyConfig()


@pytest.mark.filterwarnings("ignore")  # of the libraries, of which every one has its own
@pytest.mark.parametrize("name", BASES)
def test_a_base_goes_the_whole_way(name, tmp_path):
    lora: Any = {"fan_in_fan_out": True} if "Conv1D" in name else {}
    whole_way(fresh(name), fresh(name), BASES[name][1], tmp_path, **lora)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_lora_goes_the_whole_way(kind, tmp_path):
    whole_way(fresh("Llama"), fresh("Llama"), IDS, tmp_path, **KINDS[kind])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", BITS)
def test_a_base_in_few_bits_goes_the_way_to_stock_peft(bits, tmp_path):
    pytest.importorskip(BITS[bits])
    fresh("Llama").save_pretrained(tmp_path / "base")
    settings: Any = hf.TorchAoConfig(int8()) if bits == "torchao int8" else quantization_config(bits, torch.float32)

    def load() -> Any:
        base: Any = hf.LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        )
        keep_weight_layout(base)
        weight = base.get_submodule("model.layers.0.mlp.up_proj").weight
        assert type(weight.data) is not Tensor or not weight.is_floating_point(), "the base is not in few bits"
        return base

    whole_way(load(), load(), IDS, tmp_path, merges=False)

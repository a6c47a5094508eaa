"""The inputs of Eq. (6): every real token of a training forward once, before dropout; nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from pedyra.allocate.distributed import Average
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.pe_dyra.input_energy import InputEnergy


def watched(model: Any) -> tuple[list[AdaptedLayer], InputEnergy, list[list[Tensor]]]:
    """The layers, their energies, and a literal record of every input each layer was called with."""
    layers = attach(model)
    energy = InputEnergy(model, layers, Average())
    energy.active = True
    seen: list[list[Tensor]] = [[] for _ in layers]
    for layer, record in zip(layers, seen, strict=True):
        layer.module.register_forward_pre_hook(lambda module, args, record=record: record.append(args[0].detach()))
    return layers, energy, seen


def literal_mean_square(inputs: list[Tensor], masks: list[Tensor]) -> Tensor:
    total, count = torch.zeros(inputs[0].shape[-1]), 0
    for x, mask in zip(inputs, masks, strict=True):
        for row in range(x.shape[0]):
            for position in range(x.shape[1]):
                if mask[row, position]:
                    total += x[row, position].float() ** 2
                    count += 1
    return total / count


def agree(means: list[Tensor | None], expected: list[Tensor]) -> bool:
    pairs = zip(means, expected, strict=True)
    return all(mean is not None and torch.allclose(mean, value, rtol=1e-5, atol=1e-7) for mean, value in pairs)


CALLED = {
    "by name": lambda model, tokens: model(**tokens),
    "by position": lambda model, tokens: model(tokens["input_ids"], tokens["attention_mask"]),
    "without a mask": lambda model, tokens: model(input_ids=tokens["input_ids"]),
}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("called", CALLED)
def test_is_the_mean_square_over_real_tokens(called, kind, make_bert, make_llama, tokens):
    model = (make_bert() if kind == "bert" else make_llama()).train()
    _, energy, seen = watched(model)
    CALLED[called](model, tokens)
    mask = torch.ones(4, 6) if called == "without a mask" else tokens["attention_mask"]
    assert agree(energy.collect(), [literal_mean_square(inputs, [mask]) for inputs in seen])


@pytest.mark.parametrize("name", ["base_model.model", "base_model.model.model"])
def test_the_mask_of_an_inner_model_that_is_called_itself_is_seen(name, make_llama, tokens):
    """As TRL's distillation calls it."""
    model = make_llama().train()
    called = model.get_submodule(name)
    _, energy, seen = watched(model)
    called(**tokens)
    assert agree(energy.collect(), [literal_mean_square(s, [tokens["attention_mask"]]) for s in seen])
    with torch.no_grad():
        model.eval()(**tokens)
    model.train()
    called(input_ids=tokens["input_ids"])  # without a mask, after a forward of the whole that had one
    expected = [literal_mean_square(inputs[-1:], [torch.ones(4, 6)]) for inputs in seen]
    assert agree(energy.collect(), expected)


def test_padding_is_known_where_a_model_puts_all_rows_in_one(tokens):
    """OPT does so before its feed-forward layers, and routers of experts do."""
    settings: dict[str, Any] = {
        **dict(vocab_size=64, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2),
        **dict(ffn_dim=24, max_position_embeddings=32, dropout=0.0),
    }
    model = OPTForCausalLM(OPTConfig(**settings))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc1", "fc2"])).train()
    _, energy, seen = watched(model)
    model(**tokens)
    mask = tokens["attention_mask"]
    assert [x.dim() for [x] in seen] == [3, 2, 2]
    expected = [literal_mean_square([x.view(*mask.shape, -1)], [mask]) for [x] in seen]
    assert agree(energy.collect(), expected)


def test_micro_batches_are_averaged_by_their_tokens(make_llama, tokens):
    model = make_llama().train()
    _, energy, _ = watched(model)
    model(**tokens)
    whole = energy.collect()
    for rows in (slice(0, 1), slice(1, 4)):
        model(**{key: value[rows] for key, value in tokens.items()})
    parts = energy.collect()
    assert agree(parts, [value for value in whole if value is not None])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_counted_once(reentrant, make_llama, tokens, checkpoint_activations):
    model = make_llama().train()
    layers, energy, seen = watched(model)
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    plain = energy.collect()
    checkpoint_activations(model, reentrant)
    calls = len(seen[0])
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    assert len(seen[0]) == calls + 2  # the forward, and its recomputation
    counts = [pair[1] for pair in energy._sums if pair is not None]
    assert {float(count) for count in counts} == {float(tokens["attention_mask"].sum())}
    assert agree(energy.collect(), [value for value in plain if value is not None])


def test_text_that_is_written_in_a_training_step_is_not_seen(make_llama, tokens):
    """As by GRPO, whose model stays in training mode for it."""
    model = make_llama().train()
    _, energy, _ = watched(model)
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    before = [float(pair[1]) for pair in energy._sums if pair is not None]
    with torch.no_grad():
        model.generate(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=3)
    assert model.training and [float(pair[1]) for pair in energy._sums if pair is not None] == before


def test_dropout_comes_after(make_net):
    model = make_net(lora_dropout=0.5).train()
    _, energy, _ = watched(model)
    x = torch.randn(5, 8)
    model(x)
    mean = energy.collect()[0]
    assert mean is not None and torch.allclose(mean, x.square().mean(0))


def test_evaluation_and_untracked_steps_are_not_seen(make_net):
    model = make_net()
    _, energy, _ = watched(model)
    model.eval()
    with torch.no_grad():
        model(torch.randn(5, 8))
    model.train()
    energy.active = False
    model(torch.randn(5, 8))
    assert energy.collect() == [None, None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_inputs_are_summed_in_float32(dtype, make_bert, tokens):
    """A feature of size 100, as outliers of real models are, has a sum of squares that float16 does not hold."""
    model = make_bert().train()
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        norm.bias.data[3] = 100.0
    _, energy, seen = watched(model)
    with torch.autocast("cpu", dtype=dtype):
        model(**tokens)
    expected = [literal_mean_square(inputs, [tokens["attention_mask"]]) for inputs in seen]
    assert max(float(mean.max()) for mean in expected) * int(tokens["attention_mask"].sum()) > 65_504
    assert agree(energy.collect(), expected)


def test_an_input_of_many_tokens_is_summed_whole(make_net):
    model = make_net().train()
    _, energy, _ = watched(model)
    x = torch.randn(40_001, 8, generator=torch.Generator().manual_seed(0))
    model(x)
    mean = energy.collect()[0]
    assert mean is not None and torch.allclose(mean, x.double().square().mean(0).float(), rtol=1e-5)


def test_a_reference_pass_without_the_adapter_is_not_seen(make_llama, tokens):
    """Preference losses run the base beside the adapted model in every step."""
    model = make_llama().train()
    _, energy, seen = watched(model)
    model(**tokens)
    expected = [literal_mean_square(inputs[:1], [tokens["attention_mask"]]) for inputs in seen]
    with model.disable_adapter():
        model(input_ids=tokens["input_ids"].flip(1), attention_mask=tokens["attention_mask"])
    model.add_adapter("reference", LoraConfig(r=2, target_modules=model.peft_config["default"].target_modules))
    model.set_adapter("reference")
    model(input_ids=tokens["input_ids"].flip(1), attention_mask=tokens["attention_mask"])
    assert agree(energy.collect(), expected)


@pytest.mark.parametrize("given", ["labels", "decoder_attention_mask", "nothing"])
def test_source_and_target_of_an_encoder_decoder_have_masks_of_their_own(given):
    """Of one length, so that shapes do not tell them apart; cross attention reads the source for keys and values."""
    shape: dict[str, Any] = dict(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    config = BartConfig(vocab_size=40, **shape, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "fc1"]
    model = get_peft_model(BartForConditionalGeneration(config), LoraConfig(r=2, target_modules=targets)).train()
    layers, energy, seen = watched(model)
    draw = torch.Generator().manual_seed(1)
    source, target = (torch.randint(3, 40, (2, 6), generator=draw) for _ in range(2))
    of_source = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    of_target = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    extra = {
        "labels": {"labels": target.masked_fill(of_target == 0, -100), "decoder_input_ids": target},
        "decoder_attention_mask": {"decoder_input_ids": target, "decoder_attention_mask": of_target},
        "nothing": {"decoder_input_ids": target},
    }[given]
    model(input_ids=source, attention_mask=of_source, **extra)
    of_target = torch.ones_like(of_target) if given == "nothing" else of_target
    expected = []
    for layer, inputs in zip(layers, seen, strict=True):
        from_source = ".encoder." in layer.name or "encoder_attn.k" in layer.name or "encoder_attn.v" in layer.name
        expected.append(literal_mean_square(inputs, [of_source if from_source else of_target]))
    assert {"model.decoder.layers.0.encoder_attn.v_proj", "model.encoder.layers.0.fc1"} <= {x.name for x in layers}
    assert agree(energy.collect(), expected)


def test_a_model_that_is_trained_in_evaluation_mode_is_seen(make_bert, tokens):
    model = make_bert().eval()
    _, energy, seen = watched(model)
    model(**tokens)
    assert agree(energy.collect(), [literal_mean_square(inputs, [tokens["attention_mask"]]) for inputs in seen])
    with torch.no_grad():
        model(**tokens)
    assert energy.collect() == [None] * len(seen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_seen(copied, make_llama, tokens):
    model = make_llama().train()
    energy = InputEnergy(model, attach(model), Average())
    energy.active = True
    model(**tokens)
    alone = energy.collect()
    model(**tokens)
    copied(model)(**{**tokens, "input_ids": tokens["input_ids"].flip(1)})
    assert agree(energy.collect(), [mean for mean in alone if mean is not None])
    hooks = [hook for module in copied(model).modules() for hook in module._forward_pre_hooks.values()]
    assert hooks and all(hook._see is None for hook in hooks), "what watches, and all that hangs on it, is copied too"


@pytest.mark.parametrize("rows", [1, 4])
def test_deberta_embeddings_of_positions_are_no_tokens(rows, tokens):
    """With `share_att_key` it calls its queries and keys with the tokens first, and then with these."""
    settings: dict[str, Any] = {
        **dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        **dict(relative_attention=True, position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"]),
        **dict(norm_rel_ebd="layer_norm", max_relative_positions=16, max_position_embeddings=32),
    }
    config = DebertaV2Config(**settings)
    names = ["query_proj", "key_proj", "value_proj"]
    model = get_peft_model(DebertaV2ForSequenceClassification(config), LoraConfig(target_modules=names)).train()
    layers, energy, seen = watched(model)
    batch = {key: value[:rows] for key, value in tokens.items()}
    model(**batch)
    assert {layer.name.split(".")[-1]: len(each) for layer, each in zip(layers, seen, strict=True)} == {
        "query_proj": 2, "key_proj": 2, "value_proj": 1
    }  # fmt: skip
    expected = [literal_mean_square(each[:1], [batch["attention_mask"]]) for each in seen]
    assert agree(energy.collect(), expected)

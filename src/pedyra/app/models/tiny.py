"""Random models of 100,000 parameters and their tokenizer are made in memory, for smoke tests without a download."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from pedyra.app.tasks.toy import toy

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")
CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_config(name: str, vocab_size: int) -> PretrainedConfig:
    """Make a config of two layers (or two of each) and width 64: in 4 bits, 64 weights share a scale."""
    return AutoConfig.for_model(vocab_size=vocab_size, pad_token_id=0, **_SHAPES[name])


# Frozen random weights at the usual 0.02 would let an adapter move the logits by little.
_STACK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 512, "initializer_range": 0.1}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny-bert": {"model_type": "bert", **_STACK},
    "tiny-llama": {
        **{"model_type": "llama", **_STACK, "num_key_value_heads": 2, "bos_token_id": 5, "eos_token_id": 6},
    },
    # As DeBERTa-v3: relative positions alone, projections shared with the content's.
    "tiny-deberta": {
        **{"model_type": "deberta-v2", **_STACK, "relative_attention": True, "max_relative_positions": -1},
        **{"position_buckets": 32, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0},
        **{"position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
    },
    "tiny-bart": {
        **{"model_type": "bart", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128},
        **{"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.1},
        **{"max_position_embeddings": 512, "bos_token_id": 5, "eos_token_id": 6, "decoder_start_token_id": 6},
        **{"forced_eos_token_id": 6},
    },
    "tiny-t5": {
        **{"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        **{"eos_token_id": 6, "decoder_start_token_id": 0},
    },
}
TINY = tuple(_SHAPES)


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Learn byte pairs from the toy data: its words are tokens, and any other text is read as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in toy()], trainer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    if name in ("tiny-bert", "tiny-deberta"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        special: dict[str, Any] = dict(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        whole = {"tiny-bart": "<s> $A </s>", "tiny-t5": "$A </s>"}.get(name, "<s> $A")
        ends = [(token, ids[token]) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=ends)
        special = dict(bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)
    fast.chat_template = CHATML if name == "tiny-llama" else None
    return fast

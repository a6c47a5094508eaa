"""Random models of 100,000 parameters and their tokenizer, made in memory: for smoke tests, no download."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from pedyra.tasks.toy import toy

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")
CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_config(name: str, vocab_size: int) -> PreTrainedConfig:
    """Two layers, width 64 (a multiple of the 64 weights that share a scale in 4 bits)."""
    shape: dict[str, Any] = dict(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, max_position_embeddings=512, pad_token_id=0)
    # Frozen random weights at the usual 0.02 would let an adapter move the logits by little.
    shape |= dict(initializer_range=0.1)
    if name == "tiny-bert":
        return BertConfig(**shape)
    return LlamaConfig(**shape, num_key_value_heads=2, bos_token_id=5, eos_token_id=6)


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte pairs learned from the toy data: its words are tokens, and any other text is read as bytes.

    tiny-llama's has a chat template.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in toy()], trainer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    if name == "tiny-bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        special: dict[str, Any] = dict(
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
        special = dict(bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)
    fast.chat_template = None if name == "tiny-bert" else CHATML
    return fast

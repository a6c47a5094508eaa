"""Rank-adaptive LoRA with TRL's SFTTrainer (pip install "pedyra[sft]"). Run: python examples/sft_trainer.py [DIR]

A tiny random Llama, and a word-level tokenizer made on the spot, so that nothing is downloaded.
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from pedyra import RankCallback, RankConfig

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows() -> Dataset:
    pairs = [(a, b) for a in range(6) for b in range(5)]
    return Dataset.from_list(
        [{"prompt": f"{WORDS[a]} plus {WORDS[b]} is", "completion": f" {WORDS[a + b]}"} for a, b in pairs]
    )


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "plus", "is", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main(output_dir: str = "runs/example_sft", rank_config: RankConfig | None = None) -> RankCallback:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    callback = RankCallback(rank_config)
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(
            output_dir,
            max_steps=60,
            learning_rate=5e-3,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            bf16=False,
        ),
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(f"{output_dir}/adapter")
    return callback


if __name__ == "__main__":
    main(*sys.argv[1:2])

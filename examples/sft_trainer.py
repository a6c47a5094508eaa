"""Fit after TRL's SFTTrainer (pip install ".[sft]"). Run: python examples/sft_trainer.py [OUTPUT_DIR] (a minute)

A tiny random Llama learns to add, with a word-level tokenizer made on the spot, so that nothing is downloaded. Look at
the last lines: how many of the LoRA's parameters the sums need, and the proof on rows of its own. The same call works
after DPOTrainer, KTOTrainer and the other Trainers of TRL.
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import pedyra

NUMBERS = [str(number) for number in range(40)]


def rows() -> Dataset:
    pairs = [(a, b) for a in range(20) for b in range(20)]
    return Dataset.from_list([{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a, b in pairs])


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "plus", "is", *NUMBERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main(output_dir: str = "runs/example_sft", steps: int = 300) -> pedyra.Fit:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    data = rows().train_test_split(test_size=0.3, seed=0)
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            bf16=False,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(f"{output_dir}/adapter")

    result = pedyra.fit(trainer, tolerance="5%")
    print(result)
    result.save(f"{output_dir}/smaller", overwrite=True)  # an ordinary LoRA folder, as the first
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])

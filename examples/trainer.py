"""Rank-adaptive LoRA with a stock transformers.Trainer. Run: python examples/trainer.py [OUTPUT_DIR]

A tiny random BERT learns whether a sequence holds more even than odd tokens; swap in your own model and data.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from pedyra import RankCallback, RankConfig


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (count, 16), generator=generator)
    labels = ((tokens % 2 == 0).sum(1) > 8).long()
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def main(output_dir: str = "runs/example_trainer", rank_config: RankConfig | None = None) -> RankCallback:
    set_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"]),
    )
    callback = RankCallback(rank_config)  # the one line
    arguments = TrainingArguments(
        output_dir,
        max_steps=60,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(512, seed=1), callbacks=[callback])
    trainer.train()
    model.save_pretrained(f"{output_dir}/adapter")  # an ordinary LoRA folder
    assert callback.allocator is not None
    for name, rank in callback.allocator.ranks.items():
        print(f"{rank:3d}  {name}")
    return callback


if __name__ == "__main__":
    main(*sys.argv[1:2])

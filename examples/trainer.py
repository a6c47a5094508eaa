"""PE-DyRA in a stock transformers.Trainer, then fit. Run: python examples/trainer.py [OUTPUT_DIR] (half a minute)

A tiny random BERT learns whether a sequence holds more even than odd tokens. Look at two things. The ranks all begin at
4, and in the end they differ from layer to layer, as the paper's scores want it. The table of the fit says how many of
the parameters this task needs at all. Put your own model and data in their place.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import pedyra
from pedyra import PeDyra


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (count, 16), generator=generator)
    labels = ((tokens % 2 == 0).sum(1) > 8).long()
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def main(output_dir: str = "runs/example_trainer", steps: int = 300) -> pedyra.Fit:
    set_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = get_peft_model(
        BertForSequenceClassification(config),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"]),
    )
    arguments = TrainingArguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(2048, seed=1), eval_dataset=rows(1024, seed=2))
    # This is the one line of PE-DyRA. Without it the Trainer trains plain LoRA, and fit works the same.
    handle = pedyra.adapt(trainer, PeDyra())
    trainer.train()
    for name, rank in handle.result.ranks.items():
        print(f"{rank:3d}  {name}")
    model.save_pretrained(f"{output_dir}/adapter")  # an ordinary LoRA folder

    result = pedyra.fit(trainer, tolerance="5%")
    print(result)
    result.save(f"{output_dir}/smaller", overwrite=True)  # another one
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])

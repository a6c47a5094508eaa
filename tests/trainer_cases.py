"""Trainers that people use, by name, ready to train a LoRA of a tiny random Llama that knows a few words."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

WORDS = ["<pad>", "<bos>", "<eos>", *"abcdefgh", "yes", "no"]
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }} <eos>{% endgeneration %} {% else %}<bos> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)
LORA: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules="all-linear")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT, **names)


def base(kind: Any = LlamaForCausalLM, **settings: Any) -> Any:
    torch.manual_seed(3)
    shape: dict[str, Any] = dict(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return kind(LlamaConfig(**shape, **settings))


def row(kind: str, draw: random.Random) -> dict[str, Any]:
    """A prompt of three letters; the right answer is yes where the first of them is an early one."""
    letters = [draw.choice("abcdefgh") for _ in range(3)]
    prompt, answers = " ".join(letters) + " ", ["yes yes", "no no"]
    right, wrong = answers if letters[0] in "abcd" else answers[::-1]
    good = draw.random() < 0.5
    asked, said = {"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": right}
    return {
        "completion": {"prompt": prompt, "completion": right},
        "chat": {"messages": [asked, said]},
        "pair": {"prompt": prompt, "chosen": right, "rejected": wrong},
        "judged": {"prompt": prompt, "completion": right if good else wrong, "label": good},
        "whole pair": {"chosen": prompt + right, "rejected": prompt + wrong},
        "question": {"prompt": prompt, "answer": right.split()[0]},
        "class": {"input_ids": [WORDS.index(x) for x in letters], "labels": int(letters[0] in "abcd")},
    }[kind]


def data(kind: str, count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    return Dataset.from_list([row(kind, draw) for _ in range(count)])


def says_right(prompts: Any, completions: Any, answer: Any, **others: Any) -> list[float]:
    return [float(said.strip().startswith(right)) for said, right in zip(completions, answer, strict=True)]


class Weighted(Trainer):
    """Class weights, as transformers' documentation does them."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / count


GENERATES: dict[str, Any] = dict(num_generations=4, max_completion_length=3, max_length=None)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: (class, kind of rows, settings of its config)
    "SFT": ("trl.SFT", "completion", {}),
    "SFT, packed": ("trl.SFT", "completion", {"packing": True, "packing_strategy": "wrapped"}),
    "SFT, loss on the assistant's turns": ("trl.SFT", "chat", {"assistant_only_loss": True}),
    "DPO": ("trl.DPO", "pair", {}),
    "KTO": ("trl.KTO", "judged", {}),
    "ORPO": ("trl.experimental.orpo.ORPO", "pair", {}),
    "CPO": ("trl.experimental.cpo.CPO", "pair", {}),
    "reward model": ("trl.Reward", "whole pair", {}),
    "GRPO": ("trl.GRPO", "question", GENERATES),
    "RLOO": ("trl.RLOO", "question", GENERATES),
    "Trainer, class weights": ("Weighted", "class", {}),
    "Trainer, label smoothing": ("Trainer", "class", {"label_smoothing_factor": 0.2}),
    "Trainer, compute_loss_func": ("Trainer", "class", {}),
}


def make_trainer(
    case: str, out: Path, *, model: Any = None, rows: int = 96, callbacks: Sequence[Any] = (), **settings: Any
) -> Any:
    """The Trainer of a case, before it has trained; `settings` are those of its config."""
    import importlib

    kind, of_rows, own = CASES[case]
    settings = {
        "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10, "max_length": 16,
        "dataloader_pin_memory": False, **own, **settings,
    }  # fmt: skip
    if settings["max_length"] is None or not kind.startswith("trl"):
        settings.pop("max_length")
    task = "SEQ_CLS" if of_rows in ("whole pair", "class") else "CAUSAL_LM"
    given: dict[str, Any] = {"train_dataset": data(of_rows, rows, 1), "eval_dataset": data(of_rows, 72, 2)}
    lora = LoraConfig(**LORA, task_type=task)  # type: ignore[arg-type]
    head: dict[str, Any] = {}
    if task == "SEQ_CLS":
        head = dict(kind=LlamaForSequenceClassification, num_labels=1 if of_rows == "whole pair" else 2)
    if not kind.startswith("trl"):
        model = get_peft_model(base(**head), lora) if model is None else model
        args = TrainingArguments(str(out), label_names=["labels"], **settings)
        of_loss = {"compute_loss_func": summed} if case.endswith("compute_loss_func") else {}
        trainer = {"Weighted": Weighted, "Trainer": Trainer}[kind]
        return trainer(model, args, callbacks=[*callbacks], **given, **of_loss)
    module, name = kind.rsplit(".", 1)
    package: Any = importlib.import_module(module)
    if of_rows == "question":
        given["reward_funcs"] = says_right
    return getattr(package, f"{name}Trainer")(
        base(**head) if model is None else model,
        args=getattr(package, f"{name}Config")(str(out), **settings),
        processing_class=tokenizer(),
        peft_config=lora if model is None else None,
        callbacks=[*callbacks],
        **given,
    )

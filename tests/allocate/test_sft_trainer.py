"""RankCallback in TRL's SFTTrainer: LoRA given as peft_config, loss on the answers only, resume."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel

from pedyra import RankCallback

trl = pytest.importorskip("trl")

WORDS = "<pad> <bos> <eos> <user> <assistant> what is two plus one three four the sum of and equals".split()

CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant> {% generation %}"
    "{{ message['content'] }} <eos>{% endgeneration %} {% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)

LORA = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")

QUESTIONS = [("what is two plus one", "three"), ("the sum of one and three equals", "four"), ("two and one", "three")]


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT, **tokens)


@pytest.fixture
def completions() -> Dataset:
    return Dataset.from_list([{"prompt": q + " ", "completion": a} for q, a in QUESTIONS] * 8)


@pytest.fixture
def chats() -> Dataset:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    return Dataset.from_list([{"messages": turn} for turn in turns] * 8)


@pytest.fixture
def train(make_llama, tokenizer, quick):
    """train(out, dataset, **SFTConfig): SFTTrainer on a plain Llama, LoRA as peft_config, and its callback."""

    def go(out: Any, dataset: Dataset, *, resume: str | None = None, **settings: Any):
        callback = RankCallback(**quick())
        args = trl.SFTConfig(
            str(out),
            **{
                "max_steps": 12,
                "per_device_train_batch_size": 2,
                "learning_rate": 2e-2,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": 4,
                "disable_tqdm": True,
                "use_cpu": True,
                "bf16": False,
                "dataloader_pin_memory": False,
                "max_length": 16,
                # TRL's default, under the name that transformers 5 does not warn of.
                "activation_checkpointing": True,
                "dataset_num_proc": None,
                **settings,
            },
        )
        trainer = trl.SFTTrainer(
            model=make_llama().unload(),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LORA,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    return go


@pytest.mark.parametrize("data", ["completions", "chats"])
def test_ranks_move_with_the_loss_on_the_answers_only(data, train, request, tmp_path, tokens, logits, make_llama):
    settings = {"completion_only_loss": True} if data == "completions" else {"assistant_only_loss": True}
    trainer, callback = train(tmp_path, request.getfixturevalue(data), **settings)
    assert [record["step"] for record in callback.allocator.history] == [3, 5, 7]
    assert len(set(callback.allocator.ranks.values())) > 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    tokens["input_ids"] %= len(WORDS)
    trainer.model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(make_llama().unload(), tmp_path / "adapter")
    assert (logits(stock) - logits(trainer.model)).abs().max() < 1e-5


def test_a_resumed_run_equals_the_unbroken_one(train, completions, tmp_path, run_state, assert_equal):
    unbroken = run_state(*train(tmp_path / "whole", completions, save_strategy="steps", save_steps=5))
    checkpoint = tmp_path / "again" / "checkpoint-5"
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", checkpoint)
    again = train(tmp_path / "again", completions, save_strategy="steps", save_steps=5, resume=str(checkpoint))
    assert_equal(run_state(*again), unbroken)


def test_the_config_that_the_user_passed_stays_as_it_was(train, completions, tmp_path):
    train(tmp_path, completions)
    assert (LORA.r, LORA.rank_pattern, LORA.alpha_pattern) == (3, {}, {})

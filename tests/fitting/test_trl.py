"""`pedyra.fit` after TRL's Trainers: their own losses, their own rows, and nothing of what they wait to log."""

# pyright: reportOptionalMemberAccess=false
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import pedyra
from pedyra.fitting.request import FitRequest
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.rows import fit_rows

pytest.importorskip("trl")

from trainer_cases import LORA, base, data, make_trainer, tokenizer  # noqa: E402


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(case, model=..., **Config): a TRL Trainer on words, before it has trained."""

    def go(case: str, model: Any = None, steps: int = 30, **settings: Any) -> Any:
        return make_trainer(case, tmp_path / case, model=model, max_steps=steps, **settings)

    return go


def fitted(trainer: Any, **wanted: Any) -> pedyra.Fit:
    """Return what is found; nothing of what the Trainer holds may change by it."""

    def state() -> Any:
        waiting = {mode: {key: [*values] for key, values in each.items()} for mode, each in trainer._metrics.items()}
        held = trainer.state.log_history, trainer.state.num_input_tokens_seen, waiting
        return copy.deepcopy((*held, trainer._total_train_tokens, torch.get_rng_state().tolist()))

    before, modes = state(), [module.training for module in trainer.model.modules()]
    trained = [p.requires_grad for p in trainer.model.parameters()]
    found = pedyra.fit(trainer, **{"rows": 72, "tolerance": "5%", **wanted})
    assert state() == before and [module.training for module in trainer.model.modules()] == modes
    assert [p.requires_grad for p in trainer.model.parameters()] == trained
    return found


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "reward model"])
def test_the_loss_is_the_one_that_was_trained(make: Any, kind: str, tmp_path: Path):
    """What was won is what the Trainer's own evaluation says, on the same rows; of DPO and KTO against the base."""
    trainer = make(kind, steps=30, per_device_eval_batch_size=3)
    trainer.train()
    found = fitted(trainer, rank=2)  # how good it is depends on the processor
    assert found.measure == "loss" and not found.is_whole
    whole = trainer.evaluate()["eval_loss"]
    with trainer.model.disable_adapter():
        if kind in ("DPO", "KTO"):  # nothing differs from the reference
            base = {"DPO": 0.6931, "KTO": 0.5}[kind]
        else:
            base = trainer.evaluate()["eval_loss"]
    assert found.tolerance.gain.mean == pytest.approx(base - whole, rel=0.15)  # means over other batches
    found.apply()
    after = trainer.evaluate()["eval_loss"]
    assert found.chosen.proof is not None
    assert after - whole == pytest.approx(found.chosen.proof.rise.mean, abs=4 * found.chosen.proof.rise.error + 0.02)
    found.save(tmp_path / "small")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["DPO", "KTO", "reward model"])
def test_the_samples_of_a_batch_are_its_rows(make: Any, kind: str):
    """A row of DPO and of a reward model is a pair, which is two sequences."""
    trainer = make(kind, per_device_eval_batch_size=3)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert TrainerJudge(trainer, trainer.model).samples(batch) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_reference_adapter_stays_whole(make: Any):
    """Trained further by DPO, the adapter is compared with a copy of itself, which is not cut."""
    trainer = make("DPO", model=get_peft_model(base(), LoraConfig(**LORA, task_type="CAUSAL_LM")))
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    assert "ref" in trainer.model.peft_config
    trainer.train()
    reference = {name: w.clone() for name, w in trainer.model.named_parameters() if ".ref." in name}
    found = fitted(trainer)
    found.apply()
    assert reference and all(same_bits(reference[n], w) for n, w in trainer.model.named_parameters() if ".ref." in n)
    assert trainer.model.active_adapters == ["default"]
    trainer.evaluate()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GRPO", "SFT"], ids=["GRPO", "DFT"])
def test_where_the_loss_is_a_surrogate_the_divergence_is_measured(make: Any, kind: str, monkeypatch: Any):
    """A surrogate is about zero whatever the model says: nothing could be told from it."""
    settings = {} if kind == "GRPO" else dict(loss_type="dft")
    trainer = make(kind, steps=3, **settings)
    trainer.train()
    if kind == "GRPO":  # so short a training has won nothing
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    monkeypatch.setattr(type(trainer), "prediction_step", None)
    found = fitted(trainer, rows=32)
    assert found.measure == "divergence from the whole adapter" and found.measure in str(found)
    assert found.tolerance.gain.mean > 0
    assert all(point.proof is None or point.proof.rise.mean >= 0 for point in found.curve)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_of_an_evaluation_holds_whole_groups_of_completions(make: Any):
    """TRL looks at it only where it evaluates: eight rows of an evaluation hold no group of sixteen."""
    trainer = make("GRPO", steps=1, num_generations=16, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.args.per_device_eval_batch_size == 8
    parts = fit_rows(trainer, None, FitRequest(rows=32))
    sizes = {len(batch["labels"]) for part in (parts.calibration, parts.heldout) for batch in part}
    assert sizes == {16}


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_given_are_tokenised_by_the_trainer(make: Any):
    trainer = make("SFT", steps=10)
    trainer.train()
    held = data("completion", 72, 5)
    found = [fitted(trainer, data=rows) for rows in (held, [*held])]
    assert "72 of data to prove by" in found[0].rows
    assert found[0].row() == found[1].row()


def questions(count: int, seed: int) -> Any:
    """Rows that SFTTrainer does not understand by itself."""
    return data("question", count, seed).rename_column("prompt", "said")


def sft(out: Path, given: dict[str, Any], **settings: Any) -> Any:
    """An SFTTrainer of questions, after two steps."""
    import trl

    args = trl.SFTConfig(
        str(out), max_steps=2, learning_rate=2e-2, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, max_length=16, **settings,
    )  # fmt: skip
    lora: Any = LoraConfig(**LORA, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    given = {"train_dataset": questions(72, 1), "processing_class": tokenizer(), "peft_config": lora, **given}
    trainer: Any = trl.SFTTrainer(base(), args, **given)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_given_are_formatted_as_those_that_were_trained_on(tmp_path: Path):
    """The Trainer may have understood them without that, or not."""
    trainer = sft(tmp_path, {"formatting_func": lambda row: f"a b {row['said']}"})
    held, losses = questions(72, 5), []
    for rows in (held, held.add_column("text", ["e e e e e e"] * len(held))):
        losses.append(fitted(trainer, data=rows, rank=1).tolerance.gain.mean)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore")
def test_rows_that_a_collator_tokenises_are_left_to_it(tmp_path: Path):
    def collate(rows: Any) -> Any:
        read = tokenizer()([f"a b {row['said']}" for row in rows], return_tensors="pt", padding=True)
        labels = read["input_ids"].masked_fill(read["attention_mask"] == 0, -100)
        return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}

    skips: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = sft(tmp_path, {"data_collator": collate}, **skips)
    found = fitted(trainer, data=questions(72, 5), rank=1)
    assert "72 of data to prove by" in found.rows


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base_with_an_8_bit_optimizer(tmp_path: Path):
    """The defaults of QLoRA, without a callback."""
    pytest.importorskip("bitsandbytes")
    from classifier_rows import rows
    from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig, TrainingArguments

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, max_position_embeddings=16)
    drawn = BertForSequenceClassification(BertConfig(**shape))
    drawn.classifier.weight.data.mul_(20)  # the head stays as it was drawn, so the adapter has to win everything
    drawn.save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=quantized)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value", "dense"], exclude_modules=["bert.pooler.dense"]
    )
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=50, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, label_names=["labels"], optim="adamw_8bit",
    )  # fmt: skip
    data: Any = {"train_dataset": rows(512, 1), "eval_dataset": rows(96, 2)}
    trainer: Any = Trainer(get_peft_model(loaded, lora), args, **data)
    trainer.train()
    packed = {name: w.clone() for name, w in trainer.model.named_parameters() if w.dtype == torch.uint8}
    assert packed
    found = pedyra.fit(trainer, rows=64, tolerance="5%")
    assert not found.is_whole
    assert all(same_bits(packed[name], w) for name, w in trainer.model.named_parameters() if name in packed)
    trainer.evaluate()  # which packs the weights for the processor, so that there is no backward pass
    again = pedyra.fit(trainer, rows=64, tolerance="5%")
    assert again.tolerance.gain.mean == pytest.approx(found.tolerance.gain.mean, rel=1e-3)
    found.apply()
    trainer.model.save_pretrained(tmp_path / "small")


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_given_get_the_reference_that_dpo_has_computed_before(make: Any):
    """Judged by the same rows, a fit wins what it wins on the Trainer's own."""
    trainer = make("DPO", steps=6, precompute_ref_log_probs=True)
    trainer.train()
    held = data("pair", 72, 5)
    evaluated = trainer.evaluate(held)["eval_loss"]
    found = fitted(trainer, data=held, rank=1)
    assert found.tolerance.gain.mean == pytest.approx(0.6931 - evaluated, abs=0.02)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_given_are_packed_only_where_the_evaluation_packs(make: Any):
    trainer = make("SFT", steps=2, packing=True, eval_packing=False)
    trainer.train()
    found = fitted(trainer, data=data("completion", 72, 5), rank=1)
    assert "72 of data to prove by" in found.rows

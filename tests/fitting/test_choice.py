"""The cut of a size that is taken, on a classifier of four classes whose pooler needs three directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pedyra.fitting.calibration import calibrate
from pedyra.fitting.choice import Choice, choosing
from pedyra.fitting.cut import cut_to
from pedyra.fitting.modes import evaluating
from pedyra.fitting.sizes import of_rank
from pedyra.trainer.judge import TrainerJudge

CLASSES = 4


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of eight tokens, of which the first tells one of four classes."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        tokens, label = torch.randint(3, 40, (8,), generator=draw), int(torch.randint(CLASSES, (1,), generator=draw))
        tokens[0] = 4 + 9 * label + int(torch.randint(8, (1,), generator=draw))
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label})
    return made


@pytest.fixture(scope="module")
def four_classes(tmp_path_factory: Any) -> Any:
    """A Trainer that has trained a stock LoRA of rank 16 of all linear layers, the pooler's among them."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    shape: Any = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    shape |= dict(num_labels=CLASSES)
    base = BertForSequenceClassification(BertConfig(**shape))
    base.classifier.weight.data.mul_(20)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", exclude_modules=["classifier"])
    arguments = TrainingArguments(
        str(tmp_path_factory.mktemp("four")), max_steps=150, per_device_train_batch_size=16, learning_rate=5e-3,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    model: Any = get_peft_model(base, lora)
    trainer = Trainer(model, arguments, train_dataset=rows(1024, 1), eval_dataset=rows(256, 2))  # type: ignore[arg-type]
    trainer.train()
    model.eval()
    return trainer


def batches_of(count: int, seed: int) -> list[dict[str, Tensor]]:
    made = rows(8 * count, seed)
    return [
        {key: torch.stack([torch.as_tensor(row[key]) for row in made[place : place + 8]]) for key in made[0]}
        for place in range(0, 8 * count, 8)
    ]


@pytest.fixture(scope="module")
def rise(four_classes: Any) -> Callable[..., float]:
    """rise(factors): of the loss on fresh rows."""
    judge, fresh = TrainerJudge(four_classes, four_classes.model), batches_of(48, 99)
    whole_one = sum(judge.losses(fresh, lambda: evaluating(judge.model)))

    def of(factors: Any) -> float:
        return (sum(judge.losses(fresh, partial(cut_to, judge.model, factors))) - whole_one) / len(fresh)

    return of


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_cut_is_never_worse_than_that_of_singular_values(four_classes: Any, rise: Any, seed: int):
    """One calibration alone may be far worse: each of these is, at a rank of 1 or 2. With a direction more where it is
    needed, at rank 2 nearly all comes back, as the update of the pooler has three large singular values."""
    judge, batches = TrainerJudge(four_classes, four_classes.model), batches_of(48, seed)
    calibration = calibrate(judge, batches[:36])
    ratios = []
    for rank in (1, 2, 3):
        choice = Choice(judge, calibration, batches[36:], "default", mixed=False)
        chosen = choice.of_rank(rank)
        assert {*chosen.ranks.values()} == {rank}
        own, singular = (rise(choice.factors(replace(chosen, way=way))) for way in ("calibrated", "singular values"))
        assert rise(choice.factors(chosen)) <= 1.15 * singular + 0.001
        ratios.append(own / singular)
    assert max(ratios) > 1.5
    mixed = Choice(judge, calibration, batches[36:], "default", mixed=True)
    chosen = mixed.of_rank(2)
    (pooler,) = (rank for name, rank in chosen.ranks.items() if "pooler" in name)
    assert pooler == 3 and sum(chosen.ranks.values()) <= 2 * len(chosen.ranks) + 3 and chosen.share < 0.15
    assert rise(mixed.factors(chosen)) < 0.01 < rise(mixed.factors(of_rank(calibration, 2)))


def test_without_rows_to_choose_by_the_calibration_s_own_cut_is_taken(four_classes: Any):
    judge, batches = TrainerJudge(four_classes, four_classes.model), batches_of(4, 5)
    choice = Choice(judge, calibrate(judge, batches), [], "default", mixed=True)
    assert choice.of_rank(2).way == "calibrated" and {*choice.of_rank(2).ranks.values()} == {2}
    assert choice.of_rank(16).ranks == choice.whole.ranks


def test_a_cut_that_says_what_the_whole_adapter_says_is_compared_with_no_other(four_classes: Any):
    """At rank 8 of 16 the calibrated cut is near, which takes two passes of a batch; at rank 1 it is far."""
    judge, batches = TrainerJudge(four_classes, four_classes.model), batches_of(48, 11)
    calibration, passes = calibrate(judge, batches[:36]), []
    answers = judge.answers
    judge.answers = lambda batch: (passes.append(batch), answers(batch))[1]
    choice = Choice(judge, calibration, batches[36:], "default", mixed=False)
    assert choice.of_rank(8).way == "calibrated" and len(passes) == 2 * 12
    passes.clear()
    choice.of_rank(1)
    assert len(passes) == (2 + 3) * 12


def test_as_many_batches_choose_in_two_processes_as_in_one():
    for batches in (8, 16, 40, 64, 128):
        assert 2 * choosing(batches, 2) == choosing(batches, 1) <= batches // 4
    assert choosing(7, 1) == 0 and choosing(128, 1) == 16

"""What a classifier's adapter won is counted from the base with a head that is fitted to its features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from pedyra.trainer.probe import PENALTIES, _regression, base_with_head, fit_head

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 5, generator=generator).double()
    return features, (features @ torch.tensor([1.0, -2, 0, 0, 0.5]).double() > 0).long()


def test_a_head_of_classes_is_scikit_learns_logistic_regression():
    features, labels = rows(60)
    weight, bias = _regression(features, labels, 2, 10.0)
    theirs = LogisticRegression(C=2 / 10, tol=1e-10, max_iter=1000).fit(features, labels)
    # Two rows of weights share the penalty that theirs puts on their difference: half of it is w / 2.
    torch.testing.assert_close(weight[1] - weight[0], torch.tensor(theirs.coef_[0]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close((bias[1] - bias[0])[None], torch.tensor(theirs.intercept_), atol=1e-3, rtol=1e-3)


def test_a_head_of_numbers_is_scikit_learns_ridge_regression():
    features, labels = rows(60)
    weight, bias = _regression(features, labels.double()[:, None], 1, 10.0)
    theirs = Ridge(alpha=10.0).fit(features, labels)
    torch.testing.assert_close(weight[0], torch.tensor(theirs.coef_), atol=1e-4, rtol=1e-3)
    assert float(bias) == pytest.approx(theirs.intercept_, abs=1e-4)


def test_features_that_tell_nothing_leave_the_shares_of_the_classes():
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(200, 50, generator=generator), (torch.arange(200) % 4 == 0).long()
    weight, bias = fit_head(features, labels, 2)
    shares = (features @ weight.T + bias).softmax(-1).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.25]), atol=0.03, rtol=0)
    overfitted, _ = _regression(features.double(), labels, 2, PENALTIES[0])
    assert weight.norm() < overfitted.norm() / 2


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_base_answers_by_the_head_that_is_fitted_to_its_own_features(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "encoder":
        base: Any = BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **SMALL))
    else:
        base = LlamaForSequenceClassification(LlamaConfig(vocab_size=30, pad_token_id=0, **SMALL))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    ids = torch.randint(1, 30, (32, 6))
    ids[:16, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": (ids[:, 3] > 15).long()}
    batch["of_the_loss"] = torch.ones(32)  # which the model does not take
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    probe = base_with_head(trainer, model, [batch], "default")
    assert probe is not None
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        before = model(**given).logits
        hidden = base.base_model(**given)
    last = batch["attention_mask"].sum(1) - 1
    features = hidden.pooler_output if kind == "encoder" else hidden.last_hidden_state[torch.arange(32), last]
    weight, bias = fit_head(features, batch["labels"], 2)
    with probe(), torch.no_grad():
        torch.testing.assert_close(model(**given).logits, features @ weight.T + bias, atol=1e-4, rtol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**given).logits, before)


def test_a_base_whose_head_was_not_trained_keeps_its_own(tmp_path):
    model = get_peft_model(
        BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **SMALL)),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2).long()}
    assert base_with_head(trainer, model, [batch], "default") is None

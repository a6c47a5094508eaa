"""What a mean loss is a mean over, as each kind of model tells when it is given one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pedyra.fitting.judge import Judge

IDS = torch.arange(3, 23).view(4, 5)
CLASSES = torch.tensor([0, 1, 1, 0])
TOKENS = torch.where(IDS % 4 == 0, -100, IDS)


@pytest.mark.parametrize(
    ("name", "labels", "samples"),
    [
        ("BertForSequenceClassification", torch.tensor([0, -100, 1, 0]), 3),
        ("BertForSequenceClassification", CLASSES[:, None], 4),
        ("BertForTokenClassification", TOKENS % 2 - 100 * (TOKENS < 0), 15),
        ("BertForMaskedLM", TOKENS, 15),
        ("GPT2LMHeadModel", TOKENS, 12),
        ("T5ForConditionalGeneration", TOKENS, 15),
        ("BartForConditionalGeneration", TOKENS[:, :1], 3),
    ],
)
def test_labels_are_those_that_give_a_loss_by_themselves(name, labels, samples, make_tiny):
    model, losses, batch = make_tiny(name).eval(), [], {"input_ids": IDS}
    if "Conditional" in name:  # it would take them from the labels
        batch["decoder_input_ids"] = IDS[:, : labels.shape[1]]
    for place in (labels != -100).nonzero():
        alone = torch.full_like(labels, -100)
        alone[tuple(place)] = labels[tuple(place)]
        losses.append(model(**batch, labels=alone).loss)
    told = torch.stack([loss for loss in losses if loss.isfinite()])
    assert len(told) == samples
    torch.testing.assert_close(model(**batch, labels=labels).loss, told.mean())
    assert Judge(model).samples({**batch, "labels": labels}) == samples


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("BertForSequenceClassification", {"labels": torch.tensor([0.1, 0.5, 2.0, 1.0])}),
        ("BertForSequenceClassification", {"labels": torch.eye(4)[:, :3]}),
        ("BertForQuestionAnswering", {"start_positions": CLASSES, "end_positions": CLASSES + 2}),
    ],
    ids=["regression", "several classes", "answers"],
)
def test_rows_count_where_labels_are_no_classes(name, labels, make_tiny):
    number: Tensor = next(iter(labels.values()))
    model = make_tiny(name, num_labels=2 if "start_positions" in labels else number[:1].numel()).eval()
    batch: dict[str, Any] = {"input_ids": IDS, **labels}
    output = model(**batch)
    rows = [model(**{key: value[i : i + 1] for key, value in batch.items()}).loss for i in range(4)]
    torch.testing.assert_close(output.loss, torch.stack(rows).mean())
    assert Judge(model).samples(batch) == 4


def test_rows_count_without_labels(make_tiny):
    assert Judge(make_tiny("GPT2LMHeadModel")).samples({"input_ids": IDS, "margin": torch.zeros(4)}) == 4

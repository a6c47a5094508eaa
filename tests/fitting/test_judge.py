"""What a mean loss is a mean over, as a model tells of one sample at a time; and which outputs are compared."""

# pyright: reportOptionalMemberAccess=false
from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import close
from torch import Tensor, nn

from pedyra.fitting.fit import Rows, fit_batches
from pedyra.fitting.judge import DivergenceJudge, Judge
from pedyra.fitting.logits import Logits, answer_logits, divergences
from pedyra.fitting.request import FitRequest

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


def test_divergence_by_hand():
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log().item(), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    expected = (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()) / 2
    assert close(divergences(student, teacher).mean(), expected)


@pytest.mark.parametrize(("name", "places"), [("GPT2LMHeadModel", slice(1, 3)), ("T5ForConditionalGeneration", [2, 3])])
def test_a_model_that_writes_is_asked_where_a_label_is(name: str, places: Any, make_tiny: Any):
    """One place before it; of an encoder-decoder, whose decoder is given the labels one place later, at it."""
    model = make_tiny(name).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, 7, 8]])}
    output = model(**batch)
    answers = answer_logits(model, batch, output.logits)
    assert answers is not None and answers.rows.tolist() == [0, 0]
    torch.testing.assert_close(answers.values, output.logits[0, places])


def sayer(model: nn.Module) -> DivergenceJudge:
    return DivergenceJudge(model, lambda batch: Logits(4 * model(batch["x"]), torch.arange(6)))


def inputs(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(6, 8, generator=generator)} for _ in range(count)]


def test_the_divergence_is_predicted_by_what_the_model_itself_would_say(make_net: Any):
    """Where the loss is a surrogate, nothing but the divergence from the whole adapter is measured: the prediction from
    gradients of the model's own samples is its second order: of the same size, where nothing makes up for it."""
    model = make_net(trained=True).eval()
    judge = sayer(model)
    fit = fit_batches(judge, Rows(calibration=inputs(150, 1), heldout=inputs(150, 3)), FitRequest(rank=2))
    assert fit.measure == judge.measure and fit.chosen.proof is not None
    assert 0 < fit.chosen.proof.rise.mean < 4 * fit.chosen.predicted


def test_a_loss_that_is_scaled_for_half_precision_says_the_same(make_net: Any):
    model = make_net(trained=True).eval()
    row = {**inputs(1, 1)[0], "labels": torch.zeros(6, 6)}
    for judge in (
        Judge(model, lambda model, batch: model(batch["x"]).sum()),
        sayer(model),
    ):
        torch.manual_seed(0)
        once = judge.trained_loss(row)
        judge.loss_scale = 1024.0
        torch.manual_seed(0)
        assert close(judge.trained_loss(row), 1024 * once)

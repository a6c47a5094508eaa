"""Answers whether B is no worse than A are held against simulation, and `pedyra.prove` is asked on a Trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import same_bits
from scipy import stats

import pedyra
from pedyra.fitting.paired import Pairs
from pedyra.fitting.prove import CANNOT_TELL, NO_WORSE, WORSE, Margin, Measurement, Proof, compare
from pedyra.trainer.probe import base_with_head
from pedyra.trainer.rows import training_rows


@pytest.mark.parametrize(
    ("given", "value", "of"),
    [("1%", 0.01, "gain"), ("0.01 loss", 0.01, "loss"), ("1e-3loss", 0.001, "loss"), ("0.5pt", 0.005, "accuracy")],
)
def test_a_margin_has_three_forms(given: Any, value: float, of: str):
    read = Margin.read(given)
    assert (read.value, read.of) == (pytest.approx(value), of)


@pytest.mark.parametrize("given", ["", "1 percent", "-1%", "nan", "inf", "100%", "200pt", "0.5pp", "0.01", 0.01, None])
def test_anything_else_is_refused(given: Any):
    with pytest.raises(ValueError, match="margin is"):
        Margin.read(given)


def proof(margin: str, a: Any, b: Any, base: Any = None, **known: Any) -> Proof:
    """Prove it of these losses."""
    of = [None if losses is None else Measurement(list(losses), {}) for losses in (a, b, base)]
    assert of[0] is not None and of[1] is not None
    known = {"a": "A", "b": "B", "rows": 8 * len(a), "weights": [8.0] * len(a), **known}
    return compare(of[0], of[1], Margin.read(margin), of[2], **known)


def test_a_loss_at_the_margin_is_seldom_proved_no_worse_and_seldom_worse():
    draw, said, count = np.random.default_rng(0), [], 1500
    for _ in range(count):
        a = draw.normal(1, 0.3, 24)
        said.append(proof("0.1 loss", a, a + draw.normal(0.1, 0.2, 24)).verdict)
    most = 0.05 * count + 3 * math.sqrt(0.05 * 0.95 * count)
    assert said.count(NO_WORSE) <= most and said.count(WORSE) <= most


def test_as_many_rows_as_are_said_to_tell_do_so_four_times_of_five():
    draw, both = np.random.default_rng(2), [True] * 285
    a, b = [True] * 9 + [False] * 6 + both, [False] * 9 + [True] * 6 + both
    given: Any = {"a": "A", "b": "B", "rows": 300, "weights": [300.0]}
    asked = compare(Measurement([1.0], {}, a), Measurement([1.0], {}, b), Margin.read("3pt"), **given)
    assert asked.verdict == CANNOT_TELL and (enough := asked.enough) is not None and enough > 300
    found = [Pairs(int(each[0]), int(each[1]), enough) for each in draw.multinomial(enough, [0.03, 0.02, 0.95], 500)]
    assert 0.7 < sum(each.upper() <= 0.03 for each in found) / 500 < 0.9
    a = draw.normal(1, 0.3, 24)
    unsure = proof("0.05 loss", a, a + stats.norm.ppf((np.arange(24) + 0.5) / 24) * 0.2)
    assert unsure.verdict == CANNOT_TELL and unsure.enough is not None and unsure.rows < unsure.enough
    batches = unsure.enough // 8
    told = [proof("0.05 loss", [0.0] * batches, draw.normal(0, 0.2, batches)).verdict for _ in range(300)]
    assert 0.65 < told.count(NO_WORSE) / 300 < 0.95


def test_a_part_of_what_was_won_is_weighed_on_the_same_rows():
    draw = np.random.default_rng(3)
    a, hard = draw.normal(0.5, 0.1, 40), draw.normal(1, 0.5, 40)
    base = a + hard  # of which B loses the same part in each batch, whatever it is
    within, beyond = (proof("10%", a, a + part * hard, base) for part in (0.09, 0.11))
    assert within.verdict == NO_WORSE and beyond.verdict == WORSE
    assert within.margin == pytest.approx(0.1 * hard.mean()) and within.difference == pytest.approx(0.09 * hard.mean())
    nothing = proof("10%", a, a, a + draw.normal(0, 0.1, 40))
    assert nothing.verdict == CANNOT_TELL and nothing.enough is None


def test_the_first_word_is_the_answer_and_a_row_has_its_fields():
    found = proof("0.01 loss", [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 0.9, 1.0])
    assert str(found).startswith(NO_WORSE) and found.upper <= 0.01 and found.difference == pytest.approx(0)
    fields = "difference, standard_error, lower, upper, margin, verdict, metric_a, metric_b"
    assert set(fields.split(", ")) <= found.row().keys()


@pytest.mark.parametrize(
    ("margin", "b", "told"),
    [
        ("0.5 loss", 0.75, "the loss of B is 0.25 higher"),
        ("0.5 loss", 0.25, "the loss of B is 0.25 lower"),
        ("0.5 loss", 0.5 + 7e-18, "the loss of B is as high as that of A"),
    ],
)
def test_a_difference_is_told_by_its_side_and_noise_of_the_arithmetic_as_none(margin: str, b: float, told: str):
    assert f"; {told}, at worst" in str(proof(margin, [0.5] * 9, [b] * 9))


def test_an_accuracy_that_rises_is_told_as_higher():
    right = [True] * 199 + [False]
    known: Any = {"a": "A", "b": "B", "rows": 200, "weights": [200.0]}
    found = compare(Measurement([1.0], {}, right), Measurement([1.0], {}, [True] * 200), Margin.read("5pt"), **known)
    assert "the accuracy of B is 0.50 points higher" in str(found)


@pytest.fixture
def trained(make_trainer: Any, tmp_path: Path) -> tuple[Any, dict[str, Path]]:
    """A Trainer, and folders of its adapter: as it is, and turned around."""
    trainer = make_trainer()
    folders = {name: tmp_path / name for name in ("same", "turned")}
    trainer.model.save_pretrained(folders["same"])
    turned = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for name, parameter in turned.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    turned.save_pretrained(folders["turned"])
    return trainer, folders


def test_a_copy_is_no_worse_and_the_trainer_stays_as_it_was(trained: Any):
    trainer, folders = trained
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trains = {name: each.requires_grad for name, each in trainer.model.named_parameters()}
    state, active, log = torch.get_rng_state(), trainer.model.active_adapter, list(trainer.state.log_history)
    found = pedyra.prove(trainer, "default", folders["same"], margin="1%")
    assert found.verdict == NO_WORSE and found.difference == pytest.approx(0, abs=1e-6)
    assert found.metric == "accuracy" and found.metric_a == found.metric_b and found.rows == 96
    assert [*trainer.model.peft_config] == ["default"] and trainer.model.active_adapter == active
    assert {name: each.requires_grad for name, each in trainer.model.named_parameters()} == trains
    after = trainer.model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)
    assert same_bits(torch.get_rng_state(), state) and trainer.state.log_history == log


def test_worse_ones_are_told_by_loss_and_by_accuracy(trained: Any):
    trainer, folders = trained
    for margin in ("1%", "0.01 loss", "0.5pt"):
        found = pedyra.prove(trainer, folders["same"], folders["turned"], margin=margin)
        assert found.verdict == WORSE, str(found)
    for margin in ("0.01 loss", "0.5pt"):
        found = pedyra.prove(trainer, folders["turned"], "default", margin=margin)
        assert found.verdict == NO_WORSE, str(found)
    base = pedyra.prove(trainer, "default", "base", margin="0.01 loss")
    trainer.model.disable_adapter_layers()
    loss = trainer.evaluate()["eval_loss"]
    assert base.loss_b == pytest.approx(loss, rel=1e-4) and base.verdict == WORSE


def test_what_a_classifier_won_is_counted_from_a_head_that_is_fitted_to_the_base(make_trainer: Any, tmp_path: Path):
    """So the loss of that base is what the Trainer's own evaluation says of it."""
    trainer = make_trainer(lora={"task_type": "SEQ_CLS"})
    trainer.model.save_pretrained(tmp_path / "same")
    found = pedyra.prove(trainer, "default", tmp_path / "same", margin="1%")
    probe = base_with_head(trainer, trainer.model, training_rows(trainer), "default")
    assert probe is not None and found.gain is not None and found.base.endswith("fitted to it")
    with probe():
        loss = trainer.evaluate()["eval_loss"]
    assert found.loss_a is not None and found.loss_a + found.gain.mean == pytest.approx(loss, rel=1e-4)
    trainer.train_dataset = None  # to fit a head on
    other = pedyra.prove(trainer, "default", tmp_path / "same", margin="1%")
    assert other.gain != found.gain and other.base.endswith("untrained")


def test_mistakes_are_told(trained: Any, make_trainer: Any, tmp_path: Path):
    trainer, folders = trained
    for told, (a, b), given in [
        ("A is the base", ("base", "default"), {"margin": "1%"}),
        ("margin is", ("default", "base"), {"margin": "much"}),
        ("does not exist", ("default", tmp_path / "nowhere"), {}),
        ("rows, and a proof takes", ("default", "base"), {"rows": 3}),
    ]:
        with pytest.raises(ValueError, match=told):
            pedyra.prove(trainer, a, b, **given)
    config = folders["turned"] / "adapter_config.json"
    trainer.model.peft_config["default"].base_model_name_or_path = "one"
    config.write_text(config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "two"'))
    if '"two"' in config.read_text():
        with pytest.raises(ValueError, match="base two"):
            pedyra.prove(trainer, "default", folders["turned"])
    trainer.compute_metrics = None
    with pytest.raises(ValueError, match="no accuracy"):
        pedyra.prove(trainer, "default", "base", margin="0.5pt")

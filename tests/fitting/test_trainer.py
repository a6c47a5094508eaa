"""`pedyra.fit(trainer)`: by the Trainer's own loss, with nothing of it changed, down to a smaller ordinary LoRA."""

from __future__ import annotations

import copy
import operator
import random
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifier_rows import accuracy, logits, rows
from closeness import close, same_bits
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

import pedyra
from pedyra.errors import UserError
from pedyra.fitting.calibration import lora_layers
from pedyra.fitting.cut import CURVE, FIT_RECORD
from pedyra.fitting.paired import Increase, Pairs
from pedyra.fitting.request import FitRequest
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.rows import _complete, fit_rows

FAST: dict[str, Any] = {"rows": 96}


def fit(trainer: Any, **wanted: Any) -> pedyra.Fit:
    return pedyra.fit(trainer, **{**FAST, **wanted})


def gain_of(result: pedyra.Fit) -> Increase:
    gain = result.tolerance.gain
    assert gain is not None
    return gain


def test_a_classifier_ends_smaller_with_a_proof_and_its_metric(make_trainer: Any, tmp_path: Path):
    trainer = make_trainer()
    found = fit(trainer, tolerance="5%")
    assert found.verdict == "flat" and found.chosen.share <= 0.5 and found.chosen.accepted
    row = found.row()
    assert row["measured_increase"] < row["tolerance"] < row["won"]
    assert set(row["metrics"]) == {"base", "whole", "smaller"} and row["metrics"]["whole"]["accuracy"] > 0.85
    told = str(found)
    assert f"{row['parameters']:,} parameters" in told and "accuracy" in told
    held = rows(96, 2)
    before = logits(trainer.model, held)
    trainer.processing_class = SimpleNamespace(save_pretrained=lambda to: Path(to, "tokenizer_config.json").touch())
    assert found.save(tmp_path / "small") == tmp_path / "small"
    assert (tmp_path / "small" / "tokenizer_config.json").is_file()  # as trainer.save_model saves it
    assert same_bits(logits(trainer.model, held), before)  # the live model is as it was
    found.apply()
    assert sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n) == row["parameters"]
    small = logits(trainer.model, held)
    labels = torch.tensor([each["labels"] for each in held])
    assert float((small.argmax(-1) == labels).float().mean()) > 0.8
    trainer.model.save_pretrained(tmp_path / "applied")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("small", "applied"))
    assert one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    again = found.save(tmp_path / "again")  # after it was applied, too
    assert (again / FIT_RECORD).read_text() == (tmp_path / "small" / FIT_RECORD).read_text()
    assert len((again / CURVE).read_text().splitlines()) == len(found.curve_rows())


def test_gradients_in_float16_are_those_of_a_loss_that_is_scaled(make_trainer: Any):
    """They would underflow, also where the base alone is in float16 and no flag of the Trainer says so."""
    trainer = make_trainer(trains=False)
    assert TrainerJudge(trainer, trainer.model).loss_scale == 1.0
    judge = TrainerJudge(trainer, trainer.model.half())
    loss = judge.trained_loss(next(iter(trainer.get_train_dataloader())))
    assert judge.loss_scale == 1024.0 and loss.dtype == torch.float32 and loss.item() > 100


class Recorder(TrainerCallback):
    """It notes what is called after training."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("prediction_step")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("evaluate")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("log")


class Counting(Trainer):
    """A Trainer with numbers of its own that its loss changes, as TRL's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = {"eval": [0], "total": torch.zeros(())}
        self.passes = {"loss": 0, "prediction": 0}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen["eval"].append(len(inputs["labels"]))
        self.seen["total"] += 1
        self.state.num_input_tokens_seen += 1
        COUNT["loss" if torch.is_grad_enabled() else "prediction"] += 1
        self.drawn = np.random.rand() + random.random() + torch.rand(1).item()
        self.log({"drawn": self.drawn})  # which would reach the trackers of the training
        return super().compute_loss(model, inputs, *args, **kwargs)


COUNT = {"loss": 0, "prediction": 0}


def state_of(trainer: Any) -> Any:
    model = trainer.model
    return {
        "state": repr(vars(trainer.state)),
        "control": repr(vars(trainer.control)),
        "args": repr(vars(trainer.args)),
        "attributes": sorted(vars(trainer)),
        "own": repr(trainer.seen),
        "calls": list(next(c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder)).calls),
        "loaders": len(trainer.accelerator._dataloaders),
        "modes": [module.training for module in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        "weights": [p.sum().item() for p in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
        "eval_loss": None,
    }


def test_nothing_of_the_trainer_changes(make_trainer: Any):
    trainer = make_trainer(Counting, given={"callbacks": [Recorder()]})
    trainer.model.train()
    batch = {key: torch.as_tensor(value)[None] for key, value in rows(1, 5)[0].items()}
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.get_base_model().bert.encoder.layer[0].eval()  # one part that its user has frozen
    before = state_of(trainer)
    assert any(each is not None for each in before["gradients"])
    fit(trainer)
    assert state_of(trainer) == before


def test_a_fit_asks_each_of_its_rows_once_a_size(make_trainer: Any):
    """96 held-out rows in batches of 2, for the whole adapter, the base model and ranks of 2 and 1; and a few batches
    to be timed."""
    trainer = make_trainer(Counting)
    COUNT.update(loss=0, prediction=0)
    found = fit(trainer, tolerance="1%")
    assert found.row()["batches"] == 48 and found.rows == "96 to calibrate, 96 of eval_dataset to prove by"
    assert COUNT["loss"] <= 96 / 8 + 2 and COUNT["prediction"] <= 4 * 48 + 8


def test_another_tolerance_is_asked_by_the_same_calibration(make_trainer: Any):
    """It says what a fit says that asks it alone, sends nothing backwards, and asks no size twice. A live adapter that
    is another one was not calibrated."""
    trainer = make_trainer(Counting)
    found = fit(trainer, tolerance="5%")
    for limit in ({"tolerance": "20pt"}, {"tolerance": "90%"}, {"changed": "30%"}, {"tolerance": "5%"}):
        alone = fit(trainer, **limit)
        COUNT.update(loss=0, prediction=0)
        other = found.at(**limit)
        assert COUNT["loss"] == 0 and COUNT["prediction"] <= 2 * 48 + 4
        assert (other.ranks, other.verdict, other.promise) == (alone.ranks, alone.verdict, alone.promise)
        row, of = other.row(), alone.row()
        for name in ("tolerance", "measured_increase", "changed", "accuracy_change"):
            assert row.get(name) == pytest.approx(of.get(name))
    COUNT.update(loss=0, prediction=0)
    found.at("1pt").at(changed="5%")
    assert COUNT["prediction"] <= 4
    with pytest.raises(UserError, match="one of them is held"):
        found.at("1pt", changed="2%")
    found.apply()
    with pytest.raises(UserError, match="changed since its calibration"):
        found.at("1pt")


def answers(trainer: Any) -> list[bool]:
    held = list(trainer.eval_dataset)
    return [
        int(row["labels"]) == label for row, label in zip(held, logits(trainer.model, held).argmax(-1), strict=True)
    ]


def test_points_of_the_accuracy_are_counted_by_rows(make_trainer: Any):
    trainer = make_trainer()
    whole = answers(trainer)
    found = fit(trainer, tolerance="20pt")
    proof, row = found.chosen.proof, found.row()
    assert found.chosen.accepted and proof is not None and (row["tolerance"], row["measure"]) == (0.2, "accuracy")
    found.apply()
    small = answers(trainer)
    lost, gained = (sum(map(operator.gt, *each)) for each in ((whole, small), (small, whole)))
    assert proof.pairs == Pairs(lost, gained, 96)
    low, high = row["accuracy_interval"]
    assert row["accuracy_change"] == pytest.approx((gained - lost) / 96)
    assert -0.2 <= low <= row["accuracy_change"] <= high


@pytest.mark.parametrize("metrics", [None, lambda prediction: {"balanced_accuracy": 0.123}])
def test_points_are_refused_where_no_row_is_right_or_wrong_before_the_calibration(make_trainer: Any, metrics: Any):
    """So they are where the task's accuracy is another one."""
    trainer = make_trainer(Counting, given={"compute_metrics": metrics})
    COUNT.update(loss=0, prediction=0)
    with pytest.raises(UserError, match="tolerance is 1pt, and this task has no accuracy of rows"):
        fit(trainer, tolerance="1pt")
    assert COUNT["prediction"] <= 48 + 8
    assert "accuracy_change" not in fit(trainer, tolerance="5%").row()


class Weighted(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (each * torch.tensor([1.0, 3.0])[labels]).mean()
        return (loss, outputs) if return_outputs else loss


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("kind", "settings", "given"),
    [
        (Weighted, {}, {}),
        (Trainer, {"label_smoothing_factor": 0.2}, {}),
        (Trainer, {}, {"compute_loss_func": summed}),
    ],
    ids=["class weights", "label smoothing", "compute_loss_func"],
)
def test_losses_are_those_of_the_trainers_own_evaluation(make_trainer: Any, kind: Any, settings: Any, given: Any):
    """The loss is the one that was trained, and not the model's."""
    trainer = make_trainer(kind, given=given, **settings)
    found = fit(trainer, tolerance="5%")
    whole = trainer.evaluate()["eval_loss"]
    with trainer.model.disable_adapter():
        gain = trainer.evaluate()["eval_loss"] - whole
    assert found.row()["won"] == pytest.approx(gain, rel=1e-4)


def test_after_ranks_have_moved(make_trainer: Any, quick: Any):
    """PE-DyRA's triples stay in the slots after training, with E trained and ranks that differ."""
    trainer = make_trainer(trains=False, max_steps=12)
    callback = pedyra.adapt(trainer, quick(paper=True)["config"])
    trainer.train()
    before = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    found = fit(trainer, rank=1)
    assert all(same_bits(each, before[name]) for name, each in trainer.model.state_dict().items())
    assert found.row()["of"] == sum(callback.allocator.ranks.values())  # type: ignore[union-attr]


def test_an_adapter_that_began_as_a_part_of_its_weights(make_trainer: Any, tmp_path: Path):
    """Its own factors are not the update; with pedyra's triples the difference is known, and detach makes it one."""
    trainer = make_trainer(lora={"init_lora_weights": "pissa"}, trains=False)
    with pytest.raises(ValueError, match="PiSSA"):
        fit(trainer)
    pedyra.attach(trainer.model)
    with pytest.raises(ValueError, match="pedyra.detach"):
        fit(trainer)
    trainer.train()
    held = rows(20, 7)
    before = logits(trainer.model, held)
    pedyra.detach(trainer.model)
    torch.testing.assert_close(logits(trainer.model, held), before, rtol=1e-3, atol=1e-4)
    found = fit(trainer, tolerance="5%")
    assert found.chosen.share < 0.6 and found.row()["of"] == 8 * len(lora_layers(trainer.model))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_what_is_saved_and_applied_of_a_schedule_free_run_is_what_was_proved(make_trainer: Any, tmp_path: Path):
    """A head that is trained beside the adapter has two sets of weights too."""
    pytest.importorskip("schedulefree", reason="needs schedulefree")
    trainer = make_trainer(lora={"modules_to_save": ["classifier"]}, optim="schedule_free_adamw", max_steps=30)
    trainer.train()
    held = rows(96, 2)
    trainer.optimizer.eval()
    averaged = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "modules_to_save" in name}
    trainer.optimizer.train()
    assert any(not close(p, averaged[n]) for n, p in trainer.model.named_parameters() if n in averaged)
    found = fit(trainer, tolerance="5%")
    saved = load_file(found.save(tmp_path / "small") / "adapter_model.safetensors")
    for name, weight in averaged.items():
        assert close(saved[name.replace("modules_to_save.default.", "")], weight)
    found.apply()
    for name, weight in averaged.items():
        assert close(trainer.model.get_parameter(name).detach(), weight)
    assert logits(trainer.model, held).isfinite().all()
    trainer.train()  # with an optimizer of its own


def test_a_router_s_loss_finds_how_many_batches_a_step_has(make_trainer: Any):
    """TRL divides it by what only a training sets; a Trainer around a loaded adapter has had none."""
    trainer = make_trainer()
    assert not hasattr(trainer, "current_gradient_accumulation_steps")
    seen = []

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        seen.append(trainer.current_gradient_accumulation_steps)
        return type(trainer).compute_loss(trainer, model, inputs, return_outputs, **more)

    trainer.compute_loss = compute_loss
    fit(trainer)
    assert set(seen) == {1} and not hasattr(trainer, "current_gradient_accumulation_steps")


@pytest.mark.parametrize("bar", [False, True])
def test_the_time_is_told_before_the_work_and_a_bar_where_the_trainer_shows_them(
    make_trainer: Any, capsys: Any, bar: bool
):
    fit(make_trainer(trains=False, disable_tqdm=not bar))
    out, err = capsys.readouterr()
    assert "training steps" in out and out.count("\n") == 1
    assert ("batch" in err) == bar


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias", "ignore:the adapter has bias=")
def test_biases_that_are_trained_are_saved_with_the_smaller_adapter(make_trainer: Any, make_bert: Any, tmp_path: Path):
    """PEFT ignores the bias of a layer that is no target, so every layer keeps a direction, as under DoRA."""
    trainer = make_trainer(lora={"bias": "lora_only"})
    found = fit(trainer, rank=1)
    found.save(tmp_path / "small")
    found.apply()
    held = rows(32, 3)
    base = make_bert(task_type=None).unload()
    base.classifier.weight.data.mul_(20)  # as of make_trainer
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "small"))
    torch.testing.assert_close(logits(loaded, held), logits(trainer.model, held))


def test_a_trainer_trains_on_what_was_applied(make_trainer: Any):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    fit(trainer, rank=2).apply()
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    after = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert after.keys() == before.keys()
    assert not all(same_bits(before[name], weight) for name, weight in after.items())


@pytest.mark.parametrize("more", [{"report": "text"}, {"each": {"a": 1.0}}, {"none": None}])
def test_what_compute_metrics_gives_beside_numbers_is_left_out(make_trainer: Any, more: dict[str, Any]):
    row = fit(make_trainer(given={"compute_metrics": lambda found: accuracy(found) | more})).row()
    assert row["metrics"]["whole"].keys() == {"accuracy"}


def test_a_metric_that_takes_no_part_of_the_rows_is_left_out_and_told(make_trainer: Any):
    def of_all(prediction: Any) -> dict[str, float]:
        raise KeyError("a row that is not there")

    with pytest.warns(UserWarning, match="a row that is not there"):
        found = fit(make_trainer(given={"compute_metrics": of_all}))
    assert found.metrics == {} and "metric" not in str(found)


def test_held_out_sets_whose_columns_differ_are_taken_together(make_trainer: Any):
    """The Trainer evaluates each by itself, and leaves out what the model does not take."""
    held = [{key: torch.as_tensor(each).tolist() for key, each in row.items()} for row in rows(96, 2)]
    numbered = Dataset.from_list([{**row, "id": place} for place, row in enumerate(held[:48])])
    named = Dataset.from_list([{**row, "id": f"row {place}"} for place, row in enumerate(held[48:])])
    found = fit(make_trainer(given={"eval_dataset": {"one": numbered, "other": named}}))
    mixed = fit(make_trainer(given={"eval_dataset": {"one": numbered, "other": held[48:]}}))
    plain = fit(make_trainer(given={"eval_dataset": held}))
    assert found.row() == mixed.row() == plain.row()


class Stream(IterableDataset):
    """Rows one after another, of a length that is known."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Any:
        return iter(self.given)


def plain(given: list[Any]) -> Any:
    """The same rows as a data set of columns."""
    return Dataset.from_list([{key: torch.as_tensor(each).tolist() for key, each in row.items()} for row in given])


SEEN, HELD = rows(96, 1), rows(96, 2)
HALVES = {"one": plain(HELD[:48]), "other": plain(HELD[48:])}
APART, THIRD = "96 to calibrate, 96 of {} to prove by", "32 to calibrate, 64 of {} to prove by"
TRAINED = "the fit is judged by rows of the train_dataset"


@pytest.mark.parametrize(
    ("train", "evaluate", "data", "told", "warned"),
    [
        (SEEN, HELD, None, APART.format("eval_dataset"), None),
        (SEEN, SEEN, HELD, APART.format("data"), None),
        (SEEN, {"a": HELD[:48], "b": HELD[48:]}, None, APART.format("eval_dataset"), None),
        (SEEN, None, HALVES, APART.format("data"), None),
        (Stream(SEEN), Stream(HELD), None, APART.format("eval_dataset"), None),  # which cannot be looked at
        (None, HELD, None, THIRD.format("eval_dataset"), None),
        (SEEN, None, None, THIRD.format("train_dataset"), TRAINED),
        (SEEN, SEEN, None, THIRD.format("eval_dataset"), TRAINED),
        (SEEN, HELD, SEEN, THIRD.format("train_dataset"), TRAINED),
    ],
)
def test_which_rows_calibrate_and_which_prove(
    make_trainer: Any, train: Any, evaluate: Any, data: Any, told: str, warned: str | None
):
    """Rows that were trained on prove nothing, unless there are no others."""
    trainer = make_trainer(trains=False, given={"train_dataset": train, "eval_dataset": evaluate})
    with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
        assert str(fit_rows(trainer, data, FitRequest(rows=96))) == told


def checkpoints(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name in older transformers
def test_a_model_that_was_loaded_checkpoints_its_activations_as_training_would(make_trainer: Any):
    seen: list[bool] = []

    class Looks(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(torch.is_grad_enabled() and checkpoints(model))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(Looks, gradient_checkpointing=True)
    base = trainer.model.get_base_model()
    base.gradient_checkpointing_disable()
    own = base.get_input_embeddings()
    before = len(own._forward_hooks)
    fit(trainer, rank=2)
    assert any(seen) and not checkpoints(trainer.model)
    assert len(own._forward_hooks) == before  # transformers' own, by which every output would take a gradient


@pytest.mark.parametrize(
    ("shared", "most", "calibrate", "told"),
    [
        (24, 128, 40, "24 of 64 rows .* too. About 25% of the held"),
        (40, 128, 64, "40 of 64 rows .* too. About 42% of the held"),  # the nature of the rows: too many to be left out
        (64, 64, 64, r"About (5|6|7|8)\d% of the held-out rows"),  # of those that were drawn
        (1, 128, 63, None),  # by chance
    ],
)
def test_a_row_that_is_held_out_too_does_not_calibrate(
    make_trainer: Any, caplog: Any, shared: int, most: int, calibrate: int, told: str | None
):
    seen = rows(64, 1)
    held = copy.deepcopy(seen[:shared]) + rows(96 - shared, 2)
    trainer = make_trainer(trains=False, given={"train_dataset": seen, "eval_dataset": held})
    found = fit_rows(trainer, None, FitRequest(rows=most))
    assert re.search(told, caplog.text) if told else not caplog.text
    assert str(found).startswith(f"{calibrate} to calibrate, ")


def test_a_trainer_of_sentence_transformers_is_judged_in_batches_of_its_own_size(make_trainer: Any):
    """Most of its losses compare rows, and of few rows nearly any adapter finds the right one."""

    class Contrastive(Trainer):
        __module__ = "sentence_transformers.base.trainer"

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            likeness = outputs.logits @ outputs.logits.T
            loss = nn.functional.cross_entropy(likeness / 100, torch.arange(len(likeness)))
            return (loss, outputs) if return_outputs else loss

    trainer = make_trainer(Contrastive, trains=False, per_device_eval_batch_size=3)
    assert gain_of(fit(trainer)).batches == 96 // 3
    trainer.args.per_device_eval_batch_size = 64  # of which 96 rows make too few
    assert gain_of(fit(trainer)).batches == 96 // 4


def test_prompts_with_images_are_refused_where_text_is_judged():
    model = nn.Linear(1, 1)
    found = {"prompt_ids": torch.zeros(1, 2), "pixel_values": torch.zeros(1, 3)}
    trainer = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model), _prepare_inputs=lambda _: found
    )
    with pytest.raises(ValueError, match=r"the prompts have images \(pixel_values\)"):
        _complete(trainer, [])


def test_trained_biases_are_told_for_the_base_model_is_not_without_them(make_trainer: Any):
    trainer = make_trainer(lora={"bias": "all"}, trains=False)
    with (
        pytest.warns(UserWarning, match="bias='all', and PEFT keeps no biases of the base model"),
        pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias"),
    ):
        fit(trainer)


def test_a_held_out_batch_without_a_label_is_left_out(make_trainer: Any):
    """Its loss is a mean of nothing, which the Trainer's own evaluation leaves out too."""
    held = [{**row, "labels": -100} if number % 4 == 0 else row for number, row in enumerate(rows(96, 2))]
    trainer = make_trainer(given={"eval_dataset": held}, per_device_eval_batch_size=1)
    found = fit(trainer, tolerance="5%")
    assert found.row()["batches"] == gain_of(found).batches == 72 and found.chosen.accepted
    with trainer.model.disable_adapter():
        base = trainer.evaluate()["eval_loss"]
    assert found.row()["won"] == pytest.approx(base - trainer.evaluate()["eval_loss"], rel=1e-4)


def test_what_is_generated_has_the_length_that_the_arguments_say(tmp_path: Path):
    """Seq2SeqTrainer hands it on in its own evaluate() alone, which need not have run."""
    torch.manual_seed(0)
    shape: Any = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    shape |= dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    base = T5ForConditionalGeneration(T5Config(**shape))
    lora = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")  # type: ignore[arg-type]
    seen, held = ([{**row, "labels": row["input_ids"].clone()} for row in rows(48, seed)] for seed in (1, 2))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        predict_with_generate=True, generation_max_length=5,
    )  # fmt: skip

    def length(prediction: Any) -> dict[str, float]:
        return {"length": float((prediction.predictions != 0).sum(1).max())}  # 0 begins each, and fills it up

    class Weighted(Seq2SeqTrainer):
        def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            return (3 * loss, outputs) if return_outputs else 3 * loss

    model: Any = get_peft_model(base, lora)  # type: ignore[arg-type]
    given: Any = {"train_dataset": seen, "eval_dataset": held}
    trainer = Weighted(model, arguments, compute_metrics=length, **given)
    trainer.train()
    assert fit(trainer, rank=1).row()["metrics"]["whole"]["length"] <= 4
    assert not hasattr(trainer, "_gen_kwargs")
    # With texts the Trainer gives the loss of the model, which is not the one that was trained.
    vars(trainer)["_gen_kwargs"] = {"max_length": 5}
    judge, batch = TrainerJudge(trainer, model.eval()), next(iter(trainer.get_eval_dataloader()))
    ((alone,), (with_texts,)) = (list(judge.losses([batch], nullcontext, each)) for each in (None, []))
    assert with_texts == alone == pytest.approx(3 * model(**batch).loss.item(), rel=1e-5)


class Stubborn(Trainer):
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return super().get_eval_dataloader(self.eval_dataset)  # type: ignore[arg-type]


def add_second(trainer: Any) -> None:
    trainer.model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    trainer.model.base_model.set_adapter(["default", "second"])


def drop_rows(trainer: Any) -> None:
    trainer.train_dataset = trainer.eval_dataset = None


@pytest.mark.parametrize(
    ("kind", "change", "asked", "message"),
    [
        (Trainer, lambda trainer: setattr(trainer, "is_fsdp_enabled", True), {}, "FSDP.*pedyra fit FOLDER"),
        (Trainer, lambda trainer: setattr(trainer, "is_deepspeed_enabled", True), {}, "DeepSpeed.*pedyra fit FOLDER"),
        (Trainer, lambda trainer: trainer.model.merge_adapter(), {}, "is merged into .*unmerge_adapter"),
        (
            Trainer,
            lambda trainer: trainer.model.base_model.disable_adapter_layers(),
            {},
            "'default' is switched off in",
        ),
        (Trainer, lambda trainer: setattr(trainer, "model", trainer.model.unload()), {}, "without an adapter"),
        (Trainer, add_second, {}, "the model has 2 active adapters .*choose one with model.set_adapter"),
        (
            Trainer,
            lambda trainer: setattr(trainer, "eval_dataset", rows(9, 2)),
            {},
            "12 .* calibrate and 5 of held-out",
        ),
        (Trainer, drop_rows, {}, "no eval_dataset and no train_dataset; give rows as data="),
        (Trainer, lambda trainer: setattr(trainer, "data_collator", list), {}, "each a list, and a fit takes dicts"),
        (Trainer, None, {"data": "rows.jsonl"}, "data is 'rows.jsonl'; give the rows themselves"),
        (Trainer, None, {"tolerance": 0.1}, "tolerance is 0.1; it is a part of the gain"),
        (Stubborn, None, {"rows": 64}, "Stubborn.get_eval_dataloader gives"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(
    make_trainer: Any, kind: Any, change: Any, asked: dict[str, Any], message: str
):
    trainer = make_trainer(kind, trains=False)
    if change is not None:
        change(trainer)
    with pytest.raises(UserError, match=message) as told:
        fit(trainer, **asked)
    assert "\n" not in str(told.value)

"""Short Trainer runs of the tiny BERT, with an adjustment at steps 3, 5 and 7 of 12, and what to compare of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from windows import forced

from pedyra import PeDyra, adapt
from pedyra.allocate.scored import ScoredMethod
from pedyra.trainer.adapt import MethodTraining

STEPS = 12
SCHEDULE: dict[str, Any] = dict(interval=2, initial_warmup=1, final_warmup=3, moves=4)


@pytest.fixture
def quick() -> Callable[..., dict[str, Any]]:
    """quick(paper=False, **settings): `config`; adjustments at steps 3, 5, 7 of 12, four moves each."""

    def make(*, paper: bool = False, **settings: Any) -> dict[str, Any]:
        settings = {**SCHEDULE, **settings}
        return {"config": PeDyra.as_published(**settings)} if paper else forced(**settings)

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """32 rows of six tokens, some padded, in two classes."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(32):
        input_ids = torch.randint(3, 40, (6,), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[6 - index % 3 :] = 0
        labels = int(input_ids[0] > 20)
        rows.append({"input_ids": (input_ids * attention_mask), "attention_mask": attention_mask, "labels": labels})
    return rows


@pytest.fixture
def make_trainer(
    make_bert: Any, rows: list[dict[str, Any]], quick: Any
) -> Callable[..., tuple[Trainer, MethodTraining]]:
    """make_trainer(out, config, model=..., lora={...}, **TrainingArguments): a Trainer and the handle of `adapt`.

    adapting: further arguments of `adapt`; None: the Trainer is left as it is, and the handle is None.
    """

    def make(
        out: Path,
        config: ScoredMethod | dict[str, Any] | None = None,
        *,
        model: Any = None,
        lora: dict[str, Any] | None = None,
        adapting: dict[str, Any] | None = {},  # noqa: B006
        trainer_class: type[Trainer] = Trainer,
        **arguments: Any,
    ) -> tuple[Trainer, Any]:
        given: Any = quick() if config is None else config
        method = given["config"] if isinstance(given, dict) else given
        settings: dict[str, Any] = dict(
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        if "activation_checkpointing" not in {field.name for field in fields(TrainingArguments)}:  # its older name
            arguments = {name.replace("activation_ch", "gradient_ch"): value for name, value in arguments.items()}
        trainer = trainer_class(
            model=make_bert(**(lora or {})) if model is None else model,
            args=TrainingArguments(str(out), **{**settings, **arguments}),
            train_dataset=rows,  # type: ignore[arg-type]
            eval_dataset=rows[:8],  # type: ignore[arg-type]
        )
        trainer.remove_callback(PrinterCallback)
        return trainer, None if adapting is None else adapt(trainer, method, **adapting)

    return make


@pytest.fixture
def logits(tokens: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    """logits(model): of a fixed batch, without dropout."""

    @torch.no_grad()
    def compute(model: Any) -> Tensor:
        training = model.training
        output = model.eval()(**tokens).logits.clone()
        model.train(training)
        return output

    return compute


@pytest.fixture
def run_state() -> Callable[[Trainer, MethodTraining], dict[str, Any]]:
    """run_state(trainer, handle): everything that an exact resume must reproduce, by name."""

    def collect(trainer: Trainer, handle: MethodTraining) -> dict[str, Any]:
        allocator, model = handle.allocator, trainer.model
        assert allocator is not None and model is not None and trainer.lr_scheduler is not None
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        held = {id(p) for group in allocator.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainable.values()}, "the optimizer holds other Parameters than the model"
        return {
            # Frozen ones too: a pruned triple of PiSSA gives the weight its part back.
            "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
            "optimizer": {name: dict(allocator.optimizer.state[p]) for name, p in trainable.items()},
            "ranks": allocator.ranks,
            "history": [{k: v for k, v in record.items() if k != "seconds"} for record in allocator.history],
            "scores": allocator.run.tensors(),
            "step": allocator.step,
            "budget": (allocator.initial_parameters, allocator.run.values()),
            "scheduler": trainer.lr_scheduler.state_dict(),  # type: ignore[union-attr]
        }

    return collect


@pytest.fixture
def assert_equal() -> Callable[[Any, Any], None]:
    """assert_equal(left, right): nested dicts and lists with the same bits in every tensor."""

    def check(left: Any, right: Any, at: str = "") -> None:
        if isinstance(left, dict):
            assert left.keys() == right.keys(), at
            for key in left:
                check(left[key], right[key], f"{at}/{key}")
        elif isinstance(left, Tensor):
            assert same_bits(left, right), at
        elif isinstance(left, list | tuple):
            assert len(left) == len(right), at
            for index, pair in enumerate(zip(left, right, strict=True)):
                check(*pair, f"{at}/{index}")
        else:
            assert left == right, at

    return check

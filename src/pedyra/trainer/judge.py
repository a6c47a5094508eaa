"""Losses of a fit come from a Trainer: the loss that it trains, and its own evaluation."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import EvalLoopContainer

from pedyra.errors import UserError
from pedyra.fitting.judge import Batch, Cut, Judge, Predictions, finite
from pedyra.fitting.logits import Logits, answer_logits

PAIRS = {"DataCollatorForPreference", "DataCollatorForVisionPreference"}
"""These collators of TRL stack chosen rows on rejected ones; the loss of such a batch is a mean over its pairs."""
FP16_SCALE = 1024.0
"""A loss whose gradients are half precision is scaled by this: they would underflow."""


class TrainerJudge(Judge):
    """Losses and metrics are those of a Trainer: `compute_loss` for gradients, `prediction_step` for held-out rows."""

    def __init__(self, trainer: Trainer, model: Any) -> None:
        super().__init__(model)
        self.trainer: Any = trainer
        # Of autocast, of the base, or of its 4-bit layers.
        types = {parameter.dtype for parameter in model.parameters()}
        types |= {getattr(module, "compute_dtype", None) for module in model.modules()}
        self.loss_scale = FP16_SCALE if trainer.args.fp16 or torch.float16 in types else 1.0
        self._judges_parts = True
        """Once compute_metrics has not taken a part of the held-out rows, it is not asked again."""

    def trained_loss(self, batch: Batch) -> Tensor:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(trainer._prepare_input(batch))  # copies, and keeps its type
        count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=count)
        return loss.mean().float() * self.loss_scale

    def samples(self, batch: Batch) -> float:
        kinds = {kind.__name__ for kind in type(self.trainer.data_collator).__mro__}
        return super().samples(batch) / (2 if kinds & PAIRS else 1)

    def forward(self, batch: Batch) -> Any:
        """Return what the model gives for a batch, without a loss of its labels, which are the text of a decoder."""
        inputs = send_to_device(dict(batch), self.trainer.args.device)
        takes = forward_names(self.model)
        takes -= set() if getattr(self.model.config, "is_encoder_decoder", False) else {"labels"}
        with self.trainer.accelerator.autocast():
            return self.model(**{key: value for key, value in inputs.items() if key in takes})

    def answers(self, batch: Batch) -> Logits | None:
        # Pairs of texts, as DPO has them, are nothing that the model takes.
        if (self.writes and "labels" not in batch) or not forward_names(self.model) & batch.keys():
            return None
        return answer_logits(self.model, batch, getattr(self.forward(batch), "logits", None))

    def losses(self, batches: Sequence[Batch], cut: Cut, predictions: Predictions | None = None) -> Iterator[float]:
        trainer = self.trainer
        judges = self._judges_parts and trainer.compute_metrics is not None and not trainer.args.batch_eval_metrics
        predictions = predictions if judges else None
        torch.manual_seed(0)
        with cut():
            for number, batch in enumerate(batches):
                inputs = trainer._prepare_input(batch)  # on the device, as a prepared loader gives it
                with trainer.accelerator.autocast():
                    loss, logits, labels = trainer.prediction_step(self.model, inputs, predictions is None)
                    if predictions is not None and getattr(trainer.args, "predict_with_generate", False):
                        # With its texts it gives the model's own loss, and not that of compute_loss.
                        loss, _, _ = trainer.prediction_step(self.model, trainer._prepare_input(batch), True)
                if loss is None:
                    raise UserError(
                        f"the evaluation of {type(trainer).__name__} gives no loss for these rows; name their labels "
                        f"with TrainingArguments(label_names=...)"
                    )
                if predictions is not None and logits is not None and labels is not None:
                    if trainer.preprocess_logits_for_metrics is not None:
                        logits = trainer.preprocess_logits_for_metrics(logits, labels)
                    predictions.append(send_to_device((logits, labels), "cpu"))
                yield finite(float(loss.mean()), number)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        if not predictions:
            return {}
        logits, labels = (EvalLoopContainer(padding_index=-100) for _ in range(2))
        for each in predictions:
            for container, part in zip((logits, labels), each, strict=True):
                container.add(part)
        arrays: Any = logits.get_arrays(), labels.get_arrays()
        try:
            metrics = self.trainer.compute_metrics(EvalPrediction(*arrays))
        except Exception as error:  # whatever the function of a user raises that knows all rows together, and no part
            warnings.warn(
                f"compute_metrics judges no part of the held-out rows ({type(error).__name__}: {error}), so the fit "
                f"shows no metric",
                stacklevel=2,
            )
            self._judges_parts = False
            return {}
        numbers = (int, float, np.number)
        return {str(name): float(value) for name, value in metrics.items() if isinstance(value, numbers)}

    def correct(self, predictions: Predictions, metrics: Mapping[str, float]) -> list[bool] | None:
        """Return also None where the rows that have their label are not what the task calls its accuracy."""
        accuracy = next((value for name, value in metrics.items() if name.endswith("accuracy")), None)
        rows: list[bool] = []
        for logits, labels in predictions:
            first = logits[0] if isinstance(logits, tuple | list) else logits
            if not isinstance(first, Tensor) or not isinstance(labels, Tensor):
                return None
            guesses = first.argmax(-1) if first.dim() == 2 else first
            if labels.dim() != 1 or guesses.shape != labels.shape:  # a row has more than one label, or none
                return None
            rows += (guesses == labels).tolist()
        if accuracy is None or not rows:
            return None
        return rows if abs(sum(rows) / len(rows) - accuracy) < 1e-6 else None


def forward_names(model: Any) -> set[str]:
    """Return the names of what the base model's forward takes."""
    return {*inspect.signature(model.get_base_model().forward).parameters}

"""Every class trains in two processes as in one, or says that it has one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_in_trainers import CASES, ROWS, arguments, logits, model_of
from together import can_fork, together
from transformers import PrinterCallback, Trainer

import pedyra

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked")


def trained(rank: int, size: int, out: str, case: str) -> Any:
    """The logits at the end of a training, or why there is none. Plain SGD, at a rate at which rounding stays small."""
    method, r = CASES[case]
    settings = dict(
        per_device_train_batch_size=4 // size, optim="sgd", learning_rate=0.03, lr_scheduler_type="constant",
        ddp_backend="gloo" if size > 1 else None,
    )  # fmt: skip
    trainer = Trainer(model_of(r), arguments(Path(out), **settings), train_dataset=ROWS)
    trainer.remove_callback(PrinterCallback)
    try:
        pedyra.adapt(trainer, method)
        trainer.train()
    except ValueError as error:
        return str(error)
    return logits(trainer.model).tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_class_trains_in_two_processes_as_in_one_or_refuses(case: str, tmp_path: Path):
    first, second = together(trained, 2, str(tmp_path), case)
    assert first == second  # to the last bit
    assert isinstance(first, str) is not CASES[case][0].in_processes
    if isinstance(first, str):
        assert "one process" in first
    else:
        (alone,) = together(trained, 1, str(tmp_path), case)
        torch.testing.assert_close(torch.tensor(first), torch.tensor(alone), rtol=1e-4, atol=1e-5)

"""Engines: what a Trainer does with the same model under torch.compile, in one process and in two under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_data_parallel import assert_the_same_decisions, ending, flat
from together import can_fork, together
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from windows import on_lora
from works_with import note, rows

from pedyra import adapt

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")


class Small(nn.Module):
    """So small that it is compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(rank: int, size: int, out: str, backend: str | None, resume: str | None = None) -> dict[str, Any]:
    """Twelve steps of eight rows, whatever the number of processes."""
    torch.manual_seed(1)
    model: Any = get_peft_model(Small(), LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second", "third"]))
    draw = torch.Generator().manual_seed(7)
    examples: Any = [{"x": x, "labels": int(x[0] > 0)} for x in torch.randn(96, 8, generator=draw)]
    compiled: dict[str, Any] = {} if backend is None else dict(torch_compile=True, torch_compile_backend=backend)
    args = TrainingArguments(
        out, max_steps=12, per_device_train_batch_size=8 // size, save_steps=4, learning_rate=0.2, report_to="none",
        optim="sgd",  # of which a difference of a rounding stays one
        use_cpu=True, disable_tqdm=True, label_names=["labels"], ddp_backend="gloo" if size > 1 else None, **compiled,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=examples)
    handle = adapt(trainer, on_lora(interval=2, initial_warmup=1, final_warmup=3, moves=4, min_rank=2))
    trainer.train(resume_from_checkpoint=resume)
    assert handle.allocator is not None
    return ending(model, handle.allocator)


@pytest.mark.parametrize("size", [1, 2])
def test_compiled_a_trainer_trains_as_it_does_otherwise(size, tmp_path):
    backend = "aot_eager"
    (plain, *_), (compiled, *others) = (
        together(trained, size, str(tmp_path / name), using) for name, using in (("plain", None), ("compiled", backend))
    )
    assert all(other == compiled for other in others)
    assert any(record["pruned"] for record in compiled["history"])
    assert_the_same_decisions(compiled, plain)
    assert flat(compiled["updates"]) == pytest.approx(flat(plain["updates"]), abs=1e-6)
    checkpoint = str(tmp_path / "compiled" / "checkpoint-4")
    resumed, *_ = together(trained, size, str(tmp_path / "compiled"), backend, checkpoint)
    assert resumed["weights"] == compiled["weights"]
    name = "torch.compile, one process" if size == 1 else "torch.compile, two processes under DDP"
    note("engine", name, ranks="move", resume="the same bits", fit="not run here")


def test_the_docs_have_a_row_of_every_engine():
    compiled = ("one process", "two processes under DDP")
    sharded = {f"FSDP2 in {where}, two processes" for where in ("a Trainer", "`pedyra train`")}
    known = {"DDP, two processes", *sharded, "FSDP1", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"}
    found = {row["name"] for row in rows() if row["kind"] == "engine"}
    assert found == known | {f"torch.compile, {each}" for each in compiled}, "run: make works-with"

"""A long training with many adjustments: do memory, open files and the time of a step stay flat?

    python tests/soak/steps.py --steps 20000 --adjustments 400

trains a small network with `Trainer` and `adapt`, saves twenty times, and looks at its own process each time.
Prints a table; exit code 1 where something grew that is no record of an adjustment.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from pedyra import PeDyra, adapt
from pedyra.trainer.adapt import MethodTraining

MEGABYTES, SLOWER = 8.0, 1.25
"""What the second half of the run may take more than the first: allocators and clocks are not exact."""


@dataclass(frozen=True)
class Look:
    """What the process is after so many steps."""

    step: int
    adjustments: int
    objects: int
    """Of Python's, tensors among them, but for those that the records are made of."""
    files: int
    threads: int
    megabytes: float
    """Resident."""
    milliseconds: float
    """Of processor time, the median step since the last look."""


class Network(nn.Module):
    """A teacher's outputs are learned by four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((16, 24), (24, 24), (24, 16), (16, 8)))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SequenceClassifierOutput(loss=(x - labels).square().mean(), logits=x)  # type: ignore[arg-type]


def held(record: Any) -> int:
    """How many objects that Python's collector knows a value of dicts and lists is made of."""
    inside = record.values() if isinstance(record, dict) else record if isinstance(record, (list, tuple)) else ()
    return int(gc.is_tracked(record)) + sum(map(held, inside))


class Watch(TrainerCallback):
    def __init__(self, adapting: MethodTraining, every: int) -> None:
        self.adapting, self.every = adapting, every
        self.looks: list[Look] = []
        self.times: list[float] = []
        self.process = psutil.Process()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time() - self.began)
        if state.global_step % self.every:
            return
        gc.collect()
        assert self.adapting.allocator is not None
        history = self.adapting.allocator.history
        objects = len(gc.get_objects()) - held([history, state.log_history, self.looks])
        resident, milliseconds = self.process.memory_info().rss / 2**20, 1000 * statistics.median(self.times)
        place = state.global_step, len(history), objects, self.process.num_fds(), self.process.num_threads()
        self.looks.append(Look(*place, resident, milliseconds))
        self.times.clear()


def watch(steps: int, adjustments: int, folder: Path, places: int = 20) -> list[Look]:
    """Train, save and look at so many places."""
    torch.manual_seed(0)
    interval = (steps - 1) // (adjustments + 1)
    final_warmup = steps - (adjustments + 1) * interval - 1
    config = PeDyra.as_published(interval=interval, initial_warmup=interval, final_warmup=final_warmup)
    base = Network()
    rows = [{"x": torch.randn(16)} for _ in range(64)]
    rows = [{**row, "labels": torch.tanh(row["x"][:8] + row["x"][8:])} for row in rows]
    model = get_peft_model(base, LoraConfig(r=6, target_modules=["0", "1", "2", "3"]))  # type: ignore[arg-type]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=max(1, steps // places),
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    watching = Watch(adapt(trainer, config, record_to=folder / "ranks.jsonl"), max(1, steps // places))
    trainer.add_callback(watching)
    trainer.train()
    return watching.looks


def growth(looks: Sequence[Look]) -> dict[str, float]:
    """From the middle of the run to its end; of the times, the median of each half, as a ratio."""
    middle, end = looks[len(looks) // 2 - 1], looks[-1]
    first, second = (
        [look.milliseconds for look in part] for part in (looks[: len(looks) // 2], looks[len(looks) // 2 :])
    )
    return {
        "objects": end.objects - middle.objects,
        "files": end.files - middle.files,
        "threads": end.threads - middle.threads,
        "megabytes": end.megabytes - middle.megabytes,
        "slower": statistics.median(second) / statistics.median(first),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--adjustments", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        seen = watch(given.steps, given.adjustments, Path(scratch))
    print(" | ".join(Look.__annotations__))
    for look in seen:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in vars(look).values()))
    grown = growth(seen)
    print(grown)
    more = grown["objects"] > given.adjustments or grown["files"] > 0 or grown["threads"] > 0
    sys.exit(more or grown["megabytes"] > MEGABYTES or grown["slower"] > SLOWER)

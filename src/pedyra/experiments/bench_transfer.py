"""`pedyra bench transfer`: methods x learning rates x seeds on the byte transformer of transfer.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pedyra.experiments.contenders import contender, parse_settings
from pedyra.experiments.row_file import Row, RowFile
from pedyra.experiments.transfer import ByteTransformer, Corpus, code, held_out_loss, next_byte_loss, pretrained, prose
from pedyra.experiments.trial import run_trial

KEY = ("method", "set", "rank", "lr", "seed", "steps", "batch", "base")
"""What makes two rows the same run; `base` names the texts and the pre-trained model."""
SCALING = 1.0
"""alpha / r of every method."""
CLIP = 1.0
"""Largest norm of the gradient."""
KINDS = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Size:
    """How large the benchmark is."""

    steps: int = 800
    batch: int = 16
    width: int = 128
    depth: int = 4
    pretraining_steps: int = 1500
    held_out: int = 1024
    """Windows that are judged."""


SMOKE = Size(steps=30, batch=4, width=32, depth=2, pretraining_steps=20, held_out=16)


@dataclass(frozen=True)
class Task:
    """A pre-trained model, the text it must learn, and the windows that judge it."""

    model: ByteTransformer
    corpus: Corpus
    windows: Tensor
    name: str


def make_task(size: Size) -> Task:
    """The pre-trained model from the cache, or a few minutes of work."""
    source, target = prose(), code()
    model = pretrained(source, steps=size.pretraining_steps, width=size.width, depth=size.depth)
    name = f"{source.digest}-{target.digest}-{size.width}x{size.depth}-{size.pretraining_steps}"
    return Task(model, target, target.windows(size.held_out), name)


def layer_names(model: ByteTransformer) -> list[str]:
    """The six linear layers of every block."""
    return [f"blocks.{block}.{kind}" for block in range(model.depth) for kind in KINDS]


def bench_transfer(
    methods: Sequence[str],
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    ranks: Sequence[int] = (2,),
    settings: Sequence[str] = (),
    size: Size = Size(),
    file: RowFile,
) -> Iterator[Row]:
    """A row per rank, learning rate, seed and method, in this order; rows that the file has are not made again.

    `settings` are name=value of RankConfig for `pedyra`.

    Raises:
        ValueError: an unknown method or setting, before anything is trained.
    """
    changes = parse_settings(settings)
    contenders = {name: contender(name, changes) for name in methods}
    task = make_task(size)
    jobs = [
        {
            "method": name,
            "set": ",".join(settings) if name.partition(":")[0] == "pedyra" else "",
            "rank": rank,
            "lr": lr,
            "seed": seed,
            "steps": size.steps,
            "batch": size.batch,
            "base": task.name,
        }
        for rank in ranks
        for seed in seeds
        for lr in lrs
        for name in methods
    ]

    def run(job: Row) -> Row:
        generator = torch.Generator().manual_seed(1000 + job["seed"])

        def loss(model: nn.Module) -> Tensor:
            return next_byte_loss(model, task.corpus.batch(size.batch, generator))

        trial = run_trial(
            task.model,
            layer_names(task.model),
            contenders[job["method"]],
            loss,
            rank=job["rank"],
            lr=job["lr"],
            steps=size.steps,
            seed=job["seed"],
            scaling=SCALING,
            warmup=size.steps // 20,
            clip=CLIP,
            fused=True,
        )
        result = float("nan") if trial.diverged else held_out_loss(trial.model, task.windows)
        return {
            "loss": result,
            "parameters": trial.parameters,
            "adjustments": trial.adjustments,
            "ranks": trial.ranks,
            "seconds": round(trial.seconds, 1),
        }

    yield from file.complete(jobs, run)

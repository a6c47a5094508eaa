"""`pedyra bench transfer`: methods x learning rates x seeds on the byte transformer of `bytes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pedyra.lab.bench.bytes import TARGETS, ByteTransformer, Corpus, held_out_loss, next_byte_loss, pretrained, prose
from pedyra.lab.bench.rows import Row, RowFile
from pedyra.lab.bench.run import Setting, run_method
from pedyra.lab.bench.spec import parse_method

SCALING = 1.0
"""alpha / r of every method."""
CLIP = 1.0
"""Largest norm of the gradient."""


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
    target: str = "code"
    """One of `TARGETS`."""


SMOKE = Size(steps=40, batch=4, width=32, depth=2, pretraining_steps=20, held_out=16)


@dataclass(frozen=True)
class Lesson:
    """A pre-trained model, the text it must learn, and the windows that judge it."""

    model: ByteTransformer
    corpus: Corpus
    windows: Tensor
    name: str


@lru_cache(maxsize=1)
def make_lesson(size: Size) -> Lesson:
    """The pre-trained model from the cache, or a few minutes of work."""
    source, target = prose(), TARGETS[size.target]()
    model = pretrained(source, steps=size.pretraining_steps, width=size.width, depth=size.depth)
    name = f"{source.digest}-{target.digest}-{size.width}x{size.depth}-{size.pretraining_steps}"
    return Lesson(model, target, target.windows(size.held_out), name)


def bench_transfer(
    methods: Sequence[str],
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    ranks: Sequence[int] = (2,),
    size: Size = Size(),
    file: RowFile,
) -> Iterator[Row]:
    """A row per rank, learning rate, seed and method, in this order; rows that the file has are not made again.

    Raises:
        ValueError: an unknown method or setting, before anything is trained.
    """
    specs = {text: parse_method(text) for text in methods}
    lesson = make_lesson(size)
    jobs = [
        {"method": text, "config": specs[text].digest, "rank": rank, "lr": lr, "seed": seed}
        | {"steps": size.steps, "batch": size.batch, "base": lesson.name}
        for rank in ranks
        for seed in seeds
        for lr in lrs
        for text in methods
    ]

    def run(job: Row) -> Row:
        def windows() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(1000 + job["seed"])
            while True:
                yield lesson.corpus.batch(size.batch, generator)

        setting = Setting(
            base=lesson.model,
            layers=lesson.model.layer_names,
            loss=next_byte_loss,
            batches=windows,
            rank=job["rank"],
            lr=job["lr"],
            steps=size.steps,
            seed=job["seed"],
            scaling=SCALING,
            warmup=size.steps // 20,
            clip=CLIP,
            fused=True,
        )
        outcome = run_method(specs[job["method"]], setting)
        return {
            "loss": float("nan") if outcome.diverged else held_out_loss(outcome.model, lesson.windows),
            "parameters": outcome.parameters,
            "adjustments": outcome.adjustments,
            "ranks": outcome.ranks,
            "seconds": round(outcome.seconds, 1),
        }

    yield from file.complete(jobs, run)

"""`pedyra bench transfer`: methods x learning rates x seeds on the byte transformer of `bytes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pedyra.lab.bench.bytes import TARGETS, held_out_loss, next_byte_loss, pretrained, prose
from pedyra.lab.bench.method_run import BenchTraining, run_method
from pedyra.lab.bench.rows import Row, RowFile
from pedyra.lab.bench.spec import parse_method


@dataclass(frozen=True)
class TransferSize:
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


SMOKE = TransferSize(steps=40, batch=4, width=32, depth=2, pretraining_steps=20, held_out=16)


def bench_transfer(
    methods: Sequence[str],
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    ranks: Sequence[int] = (2,),
    size: TransferSize = TransferSize(),
    file: RowFile,
) -> Iterator[Row]:
    """A row per rank, seed, learning rate and method, in this order; rows that the file has are not made again.

    The pre-trained model comes from the cache, or takes a few minutes.

    Raises:
        ValueError: an unknown method or setting, before anything is trained.
    """
    specs = {text: parse_method(text) for text in methods}
    source, corpus = prose(), TARGETS[size.target]()
    model = pretrained(source, steps=size.pretraining_steps, width=size.width, depth=size.depth)
    judged = corpus.windows(size.held_out)
    base = f"{source.digest}-{corpus.digest}-{size.width}x{size.depth}-{size.pretraining_steps}"
    jobs = [
        {"method": text, "config": specs[text].digest, "rank": rank, "lr": lr, "seed": seed}
        | {"steps": size.steps, "batch": size.batch, "base": base}
        for rank, seed, lr, text in product(ranks, seeds, lrs, methods)
    ]

    def run(job: Row) -> Row:
        def windows() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(1000 + job["seed"])
            while True:
                yield corpus.batch(size.batch, generator)

        training = BenchTraining(
            base=model,
            layers=model.layer_names,
            loss=next_byte_loss,
            batches=windows,
            rank=job["rank"],
            lr=job["lr"],
            steps=size.steps,
            seed=job["seed"],
            warmup=size.steps // 20,
            clip=1.0,
        )
        done = run_method(specs[job["method"]], training)
        return {
            "loss": float("nan") if done.diverged else held_out_loss(done.model, judged),
            "parameters": done.parameters,
            "adjustments": done.adjustments,
            "ranks": done.ranks,
            "seconds": round(done.seconds, 1),
        }

    yield from file.complete(jobs, run)

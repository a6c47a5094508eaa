"""`pedyra bench transfer`: methods x learning rates x seeds on the byte transformer of transfer.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pedyra.bench.contenders import check_length, contender
from pedyra.bench.loop import Loss
from pedyra.bench.pattern_search import Round, search_pattern
from pedyra.bench.patterns import parse_ranks, parse_settings
from pedyra.bench.transfer import (
    TARGETS,
    ByteTransformer,
    Corpus,
    held_out_loss,
    next_byte_loss,
    pretrained,
    prose,
)
from pedyra.bench.trial import run_trial
from pedyra.compare.row_file import Row, RowFile

KEY = ("method", "set", "config", "rank", "lr", "seed", "steps", "batch", "base")
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
    target: str = "code"
    """One of `transfer.TARGETS`."""


SMOKE = Size(steps=40, batch=4, width=32, depth=2, pretraining_steps=20, held_out=16)


@dataclass(frozen=True)
class Task:
    """A pre-trained model, the text it must learn, and the windows that judge it."""

    model: ByteTransformer
    corpus: Corpus
    windows: Tensor
    name: str


@lru_cache(maxsize=1)
def make_task(size: Size) -> Task:
    """The pre-trained model from the cache, or a few minutes of work."""
    source, target = prose(), TARGETS[size.target]()
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
    for name, chosen in contenders.items():
        check_length(chosen, size.steps, name)
    task = make_task(size)
    jobs = [
        {
            "method": name,
            "set": ",".join(settings) if name.partition(":")[0] == "pedyra" else "",
            "config": contenders[name].config_digest,
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

        def draw() -> Loss:
            windows = task.corpus.batch(size.batch, generator)
            return lambda model: next_byte_loss(model, windows)

        trial = run_trial(
            task.model,
            layer_names(task.model),
            contenders[job["method"]],
            draw,
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


def static_name(ranks: Mapping[str, int]) -> str:
    """The contender of these ranks per type of layer."""
    return "static:" + ",".join(f"{kind}={rank}" for kind, rank in ranks.items())


def search_static(
    *, lr: float, seeds: Sequence[int], rank: int, start: str | None, rounds: int, size: Size, file: RowFile
) -> Iterator[Round]:
    """`search_pattern` over the types of layer; every run is a row of the file, as `bench transfer` makes it.

    A run that diverged counts as an infinite loss.
    """
    pattern = {**dict.fromkeys(KINDS, rank), **(parse_ranks(start) if start else {})}
    if len(pattern) > len(KINDS):
        raise ValueError(f"--start {start}: the types of layer are {', '.join(KINDS)}")
    costs = {kind: size.depth * size.width * (5 if kind in ("up", "down") else 2) for kind in KINDS}

    def evaluate(ranks: dict[str, int]) -> float:
        rows = bench_transfer([static_name(ranks)], lrs=[lr], seeds=seeds, ranks=[rank], size=size, file=file)
        losses = [math.inf if row["loss"] is None else row["loss"] for row in rows]
        return sum(losses) / len(losses)

    return search_pattern(pattern, costs, evaluate, rounds=rounds)

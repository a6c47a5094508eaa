"""`pedyra bench transfer`: methods x learning rates x seeds on bytes of text, with one budget.

A method has the parameters of a uniform rank. IncreLoRA and AdaLoRA, whose budget is one of ranks, may end with more,
as their rows tell.

A byte transformer, pre-trained on English prose, is adapted to program code or to other letters: small enough for a run
a minute, with a steep curve of quality over rank, which is what an allocation needs to show anything. Both texts come
with Python itself: the prose is its documentation, the code its standard library.
"""

from __future__ import annotations

import codecs
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pedyra.app.packaged import prepared
from pedyra.lab.bench.method_run import BenchTraining, check_run, run_method
from pedyra.lab.bench.rows import Row, RowFile
from pedyra.lab.bench.spec import parse_method

CONTEXT = 64
HEADS = 4


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with six linear layers that LoRA can adapt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_feed_forward(x))))


class ByteTransformer(nn.Module):
    """Next-byte logits `(batch, time, 256)`."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    @property
    def layer_names(self) -> list[str]:
        """The six linear layers of every block."""
        return [f"blocks.{block}.{kind}" for block in range(self.depth) for kind in ("q", "k", "v", "o", "up", "down")]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Corpus:
    """Bytes of a text as int64 `(n,)`: a training part and a held-out part that comes from other files or pages."""

    train: Tensor
    held_out: Tensor

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Windows `(size, CONTEXT + 1)` of the training part, drawn at random."""
        starts = torch.randint(0, len(self.train) - CONTEXT - 1, (size, 1), generator=generator)
        return self.train[starts + torch.arange(CONTEXT + 1)]

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name these bytes."""
        both = torch.cat([self.train, self.held_out]).to(torch.uint8)
        return hashlib.sha256(both.numpy().tobytes()).hexdigest()[:8]

    def windows(self, count: int) -> Tensor:
        """The same `count` windows of the held-out part at every call, evenly spread."""
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 2, count).long()[:, None]
        return self.held_out[starts + torch.arange(CONTEXT + 1)]


@cache
def prose(rotated: bool = False) -> Corpus:
    """Python's own language documentation (pydoc_data.topics), split by topic; `rotated`: every letter 13 places on."""
    from pydoc_data.topics import topics

    return _split([(codecs.encode(text, "rot13") if rotated else text).encode() for _, text in sorted(topics.items())])


@cache
def code() -> Corpus:
    """Modules of the standard library, split by file; about two million bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts, total = [], 0
    for file in files:
        data = file.read_bytes()
        if total < 2_000_000:
            texts.append(data)
            total += len(data)
    return _split(texts)


TARGETS: dict[str, Callable[[], Corpus]] = {"code": code, "rot13": lambda: prose(rotated=True)}
"""What the model is adapted to, by name; rot13 is the language that it knows, in letters that meant others when it
learned it."""


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte of windows `(batch, CONTEXT + 1)`."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, chunk: int = 64) -> float:
    """`next_byte_loss` of many windows, a few at a time."""
    parts = windows.split(chunk)
    return sum(float(next_byte_loss(model, part)) * len(part) for part in parts) / len(windows)


def pretrain(model: ByteTransformer, corpus: Corpus, *, steps: int) -> None:
    """Train all of a fresh model on `corpus`: AdamW, linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        next_byte_loss(model, corpus.batch(32, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def pretrained(corpus: Corpus, *, steps: int, width: int, depth: int) -> ByteTransformer:
    """A frozen byte transformer trained on `corpus` from scratch, with seed 0.

    Made once, in three to five minutes on one core, and kept as safetensors in the cache ($PEDYRA_CACHE, or
    ~/.cache/pedyra) under a name that has the text and all settings in it.
    """
    torch.manual_seed(0)
    model = ByteTransformer(width, depth)

    def fill(folder: Path) -> None:
        pretrain(model, corpus, steps=steps)
        save_file(model.state_dict(), folder / "model.safetensors")

    folder = prepared(f"byte-transformer-{corpus.digest}-{width}x{depth}-{steps}", fill)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.requires_grad_(False)


def _split(texts: list[bytes]) -> Corpus:
    """Every tenth text is held out."""
    train = b"\n".join(text for index, text in enumerate(texts) if index % 10)
    held_out = b"\n".join(text for index, text in enumerate(texts) if index % 10 == 0)
    return Corpus(*(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held_out)))


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
        ValueError: an unknown method or setting, or one that the method refuses, before anything is trained.
    """
    specs = {text: parse_method(text) for text in methods}
    source, corpus = prose(), TARGETS[size.target]()

    def training(job: Row, base: ByteTransformer) -> BenchTraining:
        def windows() -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(1000 + job["seed"])
            while True:
                yield corpus.batch(size.batch, generator)

        return BenchTraining(
            base=base,
            layers=base.layer_names,
            loss=next_byte_loss,
            batches=windows,
            rank=job["rank"],
            lr=job["lr"],
            steps=size.steps,
            seed=job["seed"],
            warmup=size.steps // 20,
            clip=1.0,
        )

    for text, rank in product(methods, ranks):
        untrained = ByteTransformer(size.width, size.depth).requires_grad_(False)
        check_run(specs[text], training({"rank": rank, "lr": lrs[0], "seed": seeds[0]}, untrained))
    model = pretrained(source, steps=size.pretraining_steps, width=size.width, depth=size.depth)
    judged = corpus.windows(size.held_out)
    name = f"{source.digest}-{corpus.digest}-{size.width}x{size.depth}-{size.pretraining_steps}"
    jobs = [
        {"method": text, "config": specs[text].digest, "rank": rank, "lr": lr, "seed": seed}
        | {"steps": size.steps, "batch": size.batch, "base": name}
        for rank, seed, lr, text in product(ranks, seeds, lrs, methods)
    ]

    def run(job: Row) -> Row:
        done = run_method(specs[job["method"]], training(job, model))
        return {
            "loss": float("nan") if done.diverged else held_out_loss(done.model, judged),
            "parameters": done.parameters,
            "adjustments": done.adjustments,
            "ranks": done.ranks,
            "seconds": round(done.seconds, 1),
        }

    yield from file.complete(jobs, run)

"""`python -m benchmarks.planted` sets every method against a known answer, the planted-rank problem.

A student with a uniform LoRA must find the ranks of a teacher's true update. The teacher is the base plus an update of
known rank per layer. What a method reaches is its error relative to the untouched base, and how far its ranks end from
the truth. All layers are width x width, so that a rank costs the same everywhere and the true ranks are exactly the
student's budget.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from benchmarks.command import Smoke, Threads, command_line, methods_option, several
from benchmarks.loop import Loop, make_optimizer
from benchmarks.rows import Row, RowFile, shown
from benchmarks.spec import MethodSpec, parse_method
from pedyra.allocate.contract import BatchLoss, Beginning, Method, Training, Work
from pedyra.app.console import new_console
from pedyra.app.options import json_option
from pedyra.errors import UserError
from pedyra.lora.attach import attach
from pedyra.lora.layer_names import pattern_keys
from pedyra.methods.names import setting_names
from pedyra.methods.registry import METHODS, changed, get_method

PLANTED_KEY = ("method", "architecture", "width", "depth", "rank", "profile", "noise", "seed", "steps", "lr")
PROFILES: dict[str, tuple[int, ...]] = {
    "design": (0, 0, 2, 0, 16, 4, 0, 12, 0, 2, 12, 0),
    "sparse": (0, 0, 0, 24, 0, 0, 0, 0, 24, 0, 0, 0),
    "linear": (0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8),
    "uniform": (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
}
"""True ranks with the budget of the student's uniform rank; "random" draws others per seed."""
WIDTH, DEPTH, RANK = 64, 12, 4
"""Every result was measured with this width of the linear layers, their number, and the student's uniform rank."""
TAIL = 0.03
"""The full-rank part of the update has this size, relative to the planted one."""
ARCHITECTURES = ("mlp", "block")
TOKENS = 8
"""The length of a sequence of the block architecture."""
BATCH = 128
RATIO_STEPS = 50
"""A row has the ratio of Eq. (2)'s gradient to the task's, where Eq. (2) is on, so often."""
SMOKE_STEPS = 24
"""The fewest in which every method does what it does."""
ORACLE = "oracle"
"""LoRA with the true ranks from the start."""
WINDOW: dict[str, Any] = dict(interval=1 / 30, initial_warmup=1 / 15, final_warmup=4 / 15)
"""Every rank-adaptive method has this schedule."""
MOVES = {"pedyra": 1 / 12, "random": 1 / 6, "mask": 1 / 12}
"""Method -> k, as a part of the total rank."""


def planted(
    chosen: Annotated[list[str] | None, methods_option("all but qlora, and the oracle")] = None,
    profiles: Annotated[
        list[str] | None, several("--profile", "design", "design, sparse, linear, uniform, random")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds.", min=1, show_default="1 with --smoke, else 5")
    ] = None,
    noises: Annotated[
        list[float] | None, several("--noise", "0", "Of the targets, by the size of the true change")
    ] = None,
    architectures: Annotated[
        list[str] | None, several("--architecture", "mlp", "mlp (residual layers) or block (transformer blocks)")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="1500")] = None,
    lrs: Annotated[list[float] | None, several("--lr", "0.005", "Learning rate", min=1e-12)] = None,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: Annotated[
        Path | None, json_option("Append each row there when it is done; rows that it holds are not made again.")
    ] = None,
) -> None:
    """Let every method look for the ranks of a planted update, and compare with the oracle that knows them."""
    console = new_console()
    for row in bench_planted(
        chosen or every_method(),
        profiles=profiles or ["design"],
        seeds=range(seeds or (1 if smoke else 5)),
        noises=noises or [0.0],
        lrs=lrs or [5e-3],
        architectures=architectures or ["mlp"],
        steps=steps or (SMOKE_STEPS if smoke else 1500),
        file=RowFile(json_file, PLANTED_KEY),
    ):
        ranks = " ".join(map(str, row["ranks"] or ["no ranks"]))
        where = f"{row['architecture']}, {row['profile']}, noise {row['noise']:g}, seed {row['seed']}, {ranks}"
        console.print(
            f"{shown(row['relative_error'])}  {row['method']}  {where}, {row['seconds']:.1f} s", soft_wrap=True
        )


@dataclass(frozen=True)
class Problem:
    """A base model to adapt, the function that it should become, and the ranks that would do it."""

    base: PlantedModel
    teacher: PlantedModel
    true_ranks: tuple[int, ...]
    noise: float
    """The standard deviation of the targets' noise, relative to the size of the true change of the output."""

    @property
    def layer_names(self) -> list[str]:
        """Return the names in the order of `true_ranks`."""
        return [f"layers.{index}" for index in range(len(self.true_ranks))]


class PlantedModel(nn.Module):
    """A stack of square linear layers without biases, `layers`; subclasses say what they compute."""

    inputs: tuple[int, ...]
    """An input has this shape beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))


class ResidualMLP(PlantedModel):
    """x -> x + tanh(W_l x) / sqrt(depth), layer after layer; x `(batch, width)`."""

    inputs = (WIDTH,)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers) ** 0.5
        return x


class Blocks(PlantedModel):
    """Pre-norm transformer blocks of six layers (q, k, v, o, up, down), four heads; x `(batch, TOKENS, width)`.

    Attention is not causal, and the feed-forward part is as wide as the model.
    """

    inputs = (TOKENS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = (len(self.layers) / 3) ** -0.5  # a block has two branches
        for first in range(0, len(self.layers), 6):
            q, k, v, o, up, down = self.layers[first : first + 6]
            h = F.layer_norm(x, x.shape[-1:])
            heads = (layer(h).unflatten(-1, (4, -1)).transpose(-3, -2) for layer in (q, k, v))
            attended = F.scaled_dot_product_attention(*heads)
            x = x + o(attended.transpose(-3, -2).flatten(-2)) * scale
            x = x + down(F.gelu(up(F.layer_norm(x, x.shape[-1:])))) * scale
        return x


def profile_ranks(profile: str, seed: int) -> tuple[int, ...]:
    """Return the true ranks of a named profile; "random" draws the layers' shares, and then the ranks from them."""
    if profile == "random":
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(DEPTH, generator=generator) ** 3
        counts = torch.multinomial(shares, RANK * DEPTH, replacement=True, generator=generator)
        return tuple(torch.bincount(counts, minlength=DEPTH).tolist())
    if profile not in PROFILES:
        raise UserError(f"profile {profile!r} is unknown; choose from {', '.join([*PROFILES, 'random'])}")
    return PROFILES[profile]


def make_problem(
    profile: str, seed: int, *, architecture: str = "mlp", noise: float = 0.0, tail: float = TAIL
) -> Problem:
    """Make a base with N(0, 1 / width) weights and a teacher whose update has the profile's ranks, and a faint tail.

    Planted directions have singular values about 1, a base weight's typical one. The tail is a full-rank Gaussian
    update of every layer, `tail` times as large (Frobenius, all layers together): no allocation reaches it, so errors
    end at a floor near tail^2 where they can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = profile_ranks(profile, seed)
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
    if not 0 <= noise < math.inf:
        raise UserError(f"noise is {noise}; it is a finite number of at least 0")
    kind = ResidualMLP if architecture == "mlp" else Blocks
    base, teacher = kind(), kind()
    size = 0.0
    with torch.no_grad():
        for layer, twin, count in zip(base.layers, teacher.layers, ranks, strict=True):
            weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            left = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, :count]
            right = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, :count]
            values = 0.5 + torch.rand(count, generator=generator)
            layer.weight.copy_(weight)  # type: ignore[operator]
            twin.weight.copy_(weight + (left * values) @ right.T)  # type: ignore[operator]
            size += float(values.square().sum())
        for twin in teacher.layers:
            faint = torch.randn(WIDTH, WIDTH, generator=generator)
            twin.weight.add_(faint * (tail * (size / DEPTH) ** 0.5 / WIDTH))  # type: ignore[operator]
    return Problem(base.requires_grad_(False), teacher.requires_grad_(False), ranks, noise)


def batches(problem: Problem, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input, target) without end: `size` Gaussian vectors, the teacher's outputs, noise on the targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = _shape(problem, size)
    while True:
        x = torch.randn(shape, generator=generator)
        target = problem.teacher(x)
        if problem.noise:
            spread = problem.noise * (target - problem.base(x)).std()
            target = target + spread * torch.randn(target.shape, generator=generator)
        yield x, target


@torch.no_grad()
def relative_error(problem: Problem, model: nn.Module) -> float:
    """Return the mean squared distance to the teacher over that of the base, on 2048 held-out vectors without noise."""
    x = torch.randn(_shape(problem, 2048), generator=torch.Generator().manual_seed(999))
    target = problem.teacher(x)
    return float((model(x) - target).square().mean() / (problem.base(x) - target).square().mean())


def _shape(problem: Problem, vectors: int) -> tuple[int, ...]:
    return (vectors // math.prod(problem.base.inputs[:-1]), *problem.base.inputs)


def every_method() -> list[str]:
    """Return the methods but those that need quantised weights, and the oracle."""
    return [*(name for name, method in METHODS.items() if method.quantization is None), ORACLE]


def bench_planted(
    methods: Sequence[str],
    *,
    profiles: Sequence[str] = ("design",),
    seeds: Sequence[int] = (0,),
    noises: Sequence[float] = (0.0,),
    lrs: Sequence[float] = (5e-3,),
    architectures: Sequence[str] = ("mlp",),
    steps: int = 1500,
    file: RowFile | None = None,
) -> Iterator[Row]:
    """Yield a row per architecture, profile, noise, seed, rate and method, in this order; known ones as they are.

    `relative_error` is 1 for the untouched base; None where the run diverged. `rank_distance` is the number of ranks
    that stand in a wrong layer: half the sum of |rank - true rank|; None, as `ranks`, for an adapter without ranks.

    Raises:
        ValueError: an unknown method, setting, profile or architecture, or a setting that the method refuses, before
            anything is trained.
    """
    file = file or RowFile(None, PLANTED_KEY)
    specs = {text: MethodSpec(text=text, name="lora") if text == ORACLE else parse_method(text) for text in methods}

    @lru_cache(maxsize=1)
    def problem_of(architecture: str, profile: str, noise: float, seed: int) -> Problem:
        return make_problem(profile, seed, architecture=architecture, noise=noise)

    cases = list(product(architectures, profiles, noises))
    for case in cases:
        problem_of(*case, seeds[0])  # raises for what cannot be
    shape = {"width": WIDTH, "depth": DEPTH, "rank": RANK, "steps": steps}
    jobs = [
        {"method": text, "profile": profile, "noise": noise, "seed": seed, "config": specs[text].digest}
        | {"lr": lr, "architecture": architecture, **shape}
        for architecture, profile, noise in cases
        for seed, lr, text in product(seeds, lrs, methods)
    ]

    def run_job(job: Row) -> Row:
        problem = problem_of(job["architecture"], job["profile"], job["noise"], job["seed"])
        return _run(problem, specs[job["method"]], job)

    yield from file.complete(jobs, run_job)


def _run(problem: Problem, spec: MethodSpec, job: Row) -> Row:
    """Adapt a copy of the base by the method, at the budget of the uniform rank, and train it by Adam with a rate that
    falls linearly to zero.

    What a method looks at before the first step comes from the run's own batches, and is not taken off its steps.
    """
    began = time.perf_counter()
    model, method = _begun(problem, spec, job)
    steps = job["steps"]
    training = Training(
        steps=lambda: steps,
        batches=lambda: (partial(_loss, batch=batch) for batch in _batches(problem, job)),
        losses=lambda part: (_every_other(problem, job, 0), _every_other(problem, job, 1)),
    )
    work = Work() if method is None else method.install(model, training=training)
    optimizer = make_optimizer(model, work, torch.optim.Adam, lr=job["lr"], fused=True)
    loop = Loop(model, work, optimizer, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    diverged, ratios = False, []
    for batch in islice(_batches(problem, job), steps):
        loop.begin_step()
        value = _loss(model, batch)
        if not value.isfinite():
            diverged = True
            break
        value.backward()
        loop.step()
        scheduler.step()
        if loop.allocator is not None and loop.taken % RATIO_STEPS == 0:
            ratio = loop.allocator.snapshot(effective_ranks=False).get("orthogonality_ratio")
            ratios += [] if ratio is None else [[loop.taken, round(ratio, 3)]]
    history = [] if loop.allocator is None else loop.allocator.history
    loop.finish()
    ranks, parameters = _final_size(model, problem.layer_names)
    seconds = time.perf_counter() - began
    wrong = None
    if ranks is not None:
        wrong = sum(abs(rank - true) for rank, true in zip(ranks, problem.true_ranks, strict=True)) / 2
    return {
        "relative_error": float("nan") if diverged else relative_error(problem, model.eval()),
        "rank_distance": wrong,
        "ranks": ranks,
        "true_ranks": list(problem.true_ranks),
        "parameters": parameters,
        "adjustments": sum(bool(record["pruned"] or record["added"]) for record in history),
        "orthogonality_ratios": ratios,
        "seconds": round(seconds, 2),
    }


def _batches(problem: Problem, job: Row) -> Iterator[tuple[Tensor, Tensor]]:
    return batches(problem, job["seed"] + 1000, BATCH)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    x, target = batch
    return (model(x) - target).square().mean()


def _every_other(problem: Problem, job: Row, first: int) -> Iterator[BatchLoss]:
    """Yield losses on every other batch of the run: no vector comes twice, so that two such sources are apart."""
    return (partial(_loss, batch=batch) for batch in islice(_batches(problem, job), first, None, 2))


def _begun(problem: Problem, spec: MethodSpec, job: Row) -> tuple[PeftModel, Method | None]:
    """Give a copy of the base the method's adapter at equal parameters, on a schedule that is the same for all; a
    setting of the spec's own wins."""
    names, entry, known = problem.layer_names, get_method(spec.name), setting_names(spec.name)
    beginning = entry.at_budget(RANK)
    if "final_rank" in spec.settings:
        beginning = Beginning(RANK)
    lora = LoraConfig(r=beginning.r, lora_alpha=RANK * beginning.alpha, target_modules=names)  # type: ignore[arg-type]
    if spec.text == ORACLE:
        ranks = {name: rank for name, rank in zip(names, problem.true_ranks, strict=True) if rank}
        keys = pattern_keys(ranks)
        pattern = {keys[name]: rank for name, rank in ranks.items()}  # of alphas too: one scaling for all
        lora = changed(lora, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=set(ranks))
    settings: dict[str, Any] = {**WINDOW, "budget": "parameters"}
    if spec.name in MOVES:
        settings["moves"] = max(1, round(MOVES[spec.name] * RANK * len(names)))
    settings = {key: value for key, value in settings.items() if key in known}
    return entry.begin(
        copy.deepcopy(problem.base), lora, {**settings, **beginning.settings, **spec.settings}, job["seed"]
    )


def _final_size(model: PeftModel, layers: Sequence[str]) -> tuple[list[int] | None, int]:
    """Return the ranks at the end (RandLoRA has none), and the parameters of the adapter as it is saved, where E is
    folded into A."""
    base: Any = model.get_base_model()
    others = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f".lora_{factor}." in name for factor in "AEB")
    )
    if model.peft_config["default"].peft_type == "RANDLORA":
        return None, others
    ranks = dict.fromkeys(layers, 0)
    if model.peft_config["default"].peft_type == "ADALORA":
        gates = {name: base.get_submodule(name).lora_E["default"] for name in layers}
        ranks |= {name: int(E.count_nonzero()) for name, E in gates.items()}
    else:
        # Rank 0 is one triple of zeros on disk.
        ranks |= {
            layer.name: layer.rank * bool(layer.a.weight.any() or layer.b.weight.any()) for layer in attach(model)
        }
    of = {name: base.get_submodule(name) for name in layers}
    adapter = sum(rank * (of[name].in_features + of[name].out_features) for name, rank in ranks.items())
    return list(ranks.values()), others + adapter


if __name__ == "__main__":
    command_line(planted)

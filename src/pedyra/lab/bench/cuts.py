"""Trained LoRAs that are cut: in different ways to one size (`pedyra bench cuts`), by fits whose promise is counted
(`pedyra bench bound`), to the sizes of smaller ones that were trained from the start (`pedyra bench sizes`), and so
that they forget less (`pedyra bench forgetting`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean  # exact: the mean of ten equal shares is that share, to the last bit
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pedyra.app.models.base import load_tokenizer, positions
from pedyra.app.recipe import Recipe
from pedyra.app.runs.evaluate import adapted_model, check_training_rows, finished_run
from pedyra.app.tasks.task import Task, load_task
from pedyra.fitting.calibration import calibrate, disabled, evaluating, lora_layers, truncated
from pedyra.fitting.curve import Ladder, Shape
from pedyra.fitting.cut import cut_factors
from pedyra.fitting.fit import LEAST
from pedyra.fitting.general import harm_first, scaled, slopes_at_half, text_batches, texts_of
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.judge import Batch, Cut, Judge, model_loss, model_outputs
from pedyra.fitting.recover import distill, recovered
from pedyra.fitting.search import Search
from pedyra.fitting.verdict import Increase, Tolerance, paired
from pedyra.fitting.worth import Balance, balance
from pedyra.lab.bench.rows import Row
from pedyra.lora.files import read_rows
from pedyra.lora.inspection import read_adapter_config

BATCH = 8
"""Rows of a batch: losses are paired batch by batch, so small ones make a better standard error."""
SHARES = (0.5, 0.25, 0.125)
RANDOM_SEEDS = 3
"""Draws of random directions."""
_SHAPE = {"method": str, "task": str, "seed": int, "budget": int, "learning_rate": float, "seconds": float}


class TrainedLora:
    """The LoRA of a finished run with its base, and held-out batches to be judged by.

    Args:
        rows: of training, to calibrate with, at most; the default is that of `pedyra fit`.
        held_out: rows to be judged by, at most; None: all of them.
        data: as `opened`.
    """

    def __init__(self, run: Path, rows: int = 1024, held_out: int | None = None, data: Path | None = None) -> None:
        self.run = run
        recipe, adapter, tokenizer, task = opened(run, data)
        self.model = adapted_model(recipe, adapter, task.num_labels, tokenizer)
        self.tokenizer = tokenizer
        precision = torch.autocast(self.model.device.type, torch.bfloat16, enabled=recipe.training.get("bf16", False))
        self.judge = Judge(self.model, precision(model_loss), precision(model_outputs))
        generator = torch.Generator().manual_seed(recipe.seed)

        def batches(part: Any, count: int) -> DataLoader[Any]:
            drawn = part.select(torch.randperm(len(part), generator=generator)[:count].tolist())
            return DataLoader(drawn, batch_size=BATCH, collate_fn=lambda found: dict(task.collator(found)))

        self.training = batches(task.train, rows)
        self.batches = list(batches(task.eval, len(task.eval) if held_out is None else held_out))
        self.weights = [self.judge.samples(batch) for batch in self.batches]
        self.whole = self.losses()

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.judge, self.training)

    @cached_property
    def ladder(self) -> Ladder:
        return Ladder(self.calibration, Shape())

    @property
    def parameters(self) -> int:
        """Of all factors A and B."""
        slots = [(module.lora_A["default"], module.lora_B["default"]) for module in lora_layers(self.model).values()]
        return sum(A.weight.numel() + B.weight.numel() for A, B in slots)

    def losses(self, cut: Cut | None = None) -> list[float]:
        """Of each held-out batch, with the model that `cut` makes; by default the adapter as it was trained."""
        return list(self.judge.losses(self.batches, cut or (lambda: evaluating(self.model))))

    def losses_at(self, ranks: Mapping[str, int], calibration: Calibration | None = None) -> list[float]:
        """Of each held-out batch, with so many ranks of each layer, in the order of a calibration; default: its own."""
        return self.losses(partial(truncated, self.model, calibration or self.calibration, ranks))

    def mean(self, losses: Sequence[float]) -> float:
        """Over the samples of all held-out batches."""
        return paired([0.0] * len(losses), losses, self.weights).mean


def opened(run: Path, data: Path | None = None) -> tuple[Recipe, Path, Any, Task]:
    """The recipe of a finished run, its adapter folder, its tokenizer and its task.

    Args:
        data: a folder that has the files of the run's rows, though they may have been elsewhere when it was trained.

    Raises:
        ValueError: it is no finished run, its adapter is no LoRA, or its rows are not those that it was trained on.
    """
    folder, recipe, adapter = finished_run(run)
    if (kind := read_adapter_config(adapter)["peft_type"]) != "LORA":
        raise ValueError(
            f"{run} has an adapter of type {kind}, and what is cut is a LoRA; give the run of another method"
        )
    if data is not None:
        files = {key: data / Path(getattr(recipe.data, key) or "").name for key in ("source", "validation")}
        found = {key: str(file) for key, file in files.items() if file.is_file()}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=found)})
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    check_training_rows(folder, recipe, task)
    return recipe, adapter, tokenizer, task


def bench_cuts(runs: Sequence[Path], shares: Sequence[float] = SHARES, rows: int = 1024) -> Iterator[dict[str, Any]]:
    """One row for each run, way and size: the rise of the held-out loss, in pairs with the whole adapter.

    Ways: `fit`, as `pedyra fit` orders and cuts; `singular values`, of s B A, by their squares per parameter; `energy`,
    the same values, each layer keeping an equal part of its own squares, which is the rule of `peft.convert_to_lora`;
    `inputs`, which knows the inputs of a layer and not its gradients; `first`, the first ranks of A and B as they are
    stored, as many in every layer; `random` directions.

    Args:
        shares: parts of the parameters that are left.
        rows: of training, to calibrate with, at most; 1.5 times as many of those held out are measured on.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--share is {share}; it is the part that is left, above 0 and at most 1")
    for run in runs:
        opened(run)  # what is wrong with one is told before anything is measured
    for run in runs:
        yield from _cuts(run, shares, rows)


def _cuts(run: Path, shares: Sequence[float], rows: int) -> Iterator[dict[str, Any]]:
    trained = TrainedLora(run, rows, held_out=rows + rows // 2)
    for way, seed, calibration in ways(trained.model, trained.calibration):
        ladder = Ladder(calibration, Shape())
        for share in shares:
            size = ladder.point(ladder.at(share))
            increase = paired(trained.whole, trained.losses_at(size.ranks, calibration), trained.weights)
            yield {
                "run": str(run), "way": way, "seed": seed, "asked": share, "rows": rows,
                "share": size.share, "parameters": size.parameters,
                "loss": trained.mean(trained.whole), "increase": increase.mean, "standard_error": increase.error,
            }  # fmt: skip


def ways(model: Any, measured: Calibration) -> Iterator[tuple[str, int | None, Calibration]]:
    """Name, seed, and bases with values by which the directions are ordered."""
    yield "fit", None, measured
    singular, energy, inputs, first = {}, {}, {}, {}
    for name, module in lora_layers(model).items():
        A, B = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        layer, scaling = measured.layers[name], module.scaling["default"]
        left, right = A.double(), (scaling * B).double()
        basis = balance(left @ left.T, right.T @ right)  # white inputs and gradients: singular values
        singular[name] = _ordered(layer, basis, basis.values)
        squares = basis.values.square()
        left = squares.flip(0).cumsum(0).flip(0) / squares.sum()  # what goes, where this and all after it go
        energy[name] = _ordered(layer, basis, (left * layer.parameters).sqrt())
        of_inputs = layer.basis.inverse * layer.basis.values @ layer.basis.inverse.T  # E[h h^T]
        basis = balance(of_inputs, (scaling * B.double()).T @ (scaling * B.double()))
        inputs[name] = _ordered(layer, basis, basis.values)
        identity, last = torch.eye(layer.rank).double(), torch.arange(layer.rank, 0, -1).double()
        first[name] = _ordered(layer, Balance(identity, identity, last), (last * layer.parameters).sqrt())
    yield "singular values", None, replace(measured, layers=singular)
    yield "energy", None, replace(measured, layers=energy)
    yield "inputs", None, replace(measured, layers=inputs)
    yield "first", None, replace(measured, layers=first)
    for seed in range(RANDOM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, layer in singular.items():
            order = torch.randperm(layer.rank, generator=generator)
            worth = torch.rand(layer.rank, generator=generator).double().sort(descending=True).values
            layers[name] = layer.reordered(worth[order.argsort()])
        yield "random", seed, replace(measured, layers=layers)


def _ordered(layer: Measured, basis: Balance, values: Tensor) -> Measured:
    """A layer whose directions are those of `basis` and go by the squares of `values` per parameter."""
    return replace(layer, basis=basis._replace(values=values.double()), tokens_per_sample=1.0)


def bench_bound(runs: Sequence[Path], fits: int = 100, tolerance: float = 0.01) -> Iterator[dict[str, Any]]:
    """One row for each run: of so many fits, each with held-out rows of its own, how many kept their promise.

    The batches of all held-out rows are taken for the whole population. A fit draws its rows from them, with
    replacement: a third for the choice and two thirds for the proof. What a size truly costs is then its mean over the
    population, so that a fit that takes a size beyond its tolerance is known. Each size is measured once, on all rows.
    """
    for run in runs:  # what is wrong with one is told before anything is measured
        *_, task = opened(run)
        if (count := math.ceil(len(task.eval) / BATCH)) < LEAST + 1:
            raise ValueError(
                f"{run} has {count} batches of {BATCH} held-out rows, and a fit takes {LEAST} for the proof and one "
                f"for the choice at least; give it more (data.eval_rows, data.validation_fraction)"
            )
    for run in runs:
        population = Population(TrainedLora(run))
        found = [population.fit(seed, tolerance) for seed in range(fits)]
        shares = [share for share, _, _ in found]
        yield {
            "run": str(run),
            "fits": fits,
            "asked": tolerance,
            "within": sum(increase <= limit for _, increase, limit in found),
            "kept_whole": shares.count(1.0),
            "share": mean(shares),
            "least_share": min(shares),
            "most_share": max(shares),
            "tolerance": mean(limit for _, _, limit in found),
            "batches": len(population.base),
        }


class Population:
    """All held-out batches of a run, and what each size of its adapter costs on each of them."""

    def __init__(self, trained: TrainedLora) -> None:
        self.trained = trained
        self.base = trained.losses(partial(disabled, trained.model))
        self._cut: dict[int, list[float]] = {}

    def losses(self, place: int) -> list[float]:
        """Of each batch, with the size at this place of the ladder."""
        if place not in self._cut:
            self._cut[place] = self.trained.losses_at(self.trained.ladder.point(place).ranks)
        return self._cut[place]

    def increase(self, losses: Sequence[float], drawn: Sequence[int]) -> Increase:
        """From the whole adapter's to these, over the batches that were drawn."""
        before, after, weights = (
            [each[i] for i in drawn] for each in (self.trained.whole, losses, self.trained.weights)
        )
        return paired(before, after, weights)

    def fit(self, seed: int, tolerance: float) -> tuple[float, float, float]:
        """The share that a fit with the rows of this seed keeps, by how much the loss truly rises, and by how much it
        may."""
        count = len(self.base)
        drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        choice, proof = drawn[: count // 3], drawn[count // 3 :]
        limit = Tolerance(self.increase(self.base, drawn), tolerance)
        samples = [sum(self.trained.weights[i] for i in part) for part in (choice, proof)]
        search = Search(
            self.trained.ladder,
            limit,
            measure=lambda place: self.increase(self.losses(place), choice),
            recover=None,
            prove=lambda place, _: self.increase(self.losses(place), proof),
            ahead=((samples[0] / samples[1]) ** 0.5, len(proof)),
        )
        chosen = search.choose() if limit.learned else None
        allowed = tolerance * self.increase(self.base, range(count)).mean
        if chosen is None:
            return 1.0, 0.0, allowed
        place = next(place for place, point in search.points.items() if point is chosen)
        return chosen.share, self.increase(self.losses(place), range(count)).mean, allowed


def bench_sizes(comparison: Path, recoveries: Sequence[int] = (0, 160), rows: int = 1024) -> Iterator[Row]:
    """One row for each task, seed, smaller rank and number of steps of recovery.

    The largest rank of `lora` in the comparison is cut to the parameters of each smaller one, and recovers for so many
    steps. Both are judged by the mean loss on the same held-out batches, all of those of the comparison. `seconds` are
    of the cut and its recovery, calibration included; `training_seconds` of the run that is cut; `sweep_seconds` of the
    smaller LoRA from the start: its runs at every rate of the grid, and this one.

    Args:
        rows: of training, to calibrate and to recover with, at most.
    """
    if not (comparison / "comparison.jsonl").is_file():
        raise ValueError(f"{comparison} has no comparison.jsonl; it takes a folder of `pedyra compare`")
    found = read_rows(comparison / "comparison.jsonl", _SHAPE | {"run": str})
    loras = [row for row in found if row["method"] == "lora"]
    ranks = sorted({row["budget"] for row in loras})
    if len(ranks) < 2:
        raise ValueError(
            f"{comparison} has LoRAs of {len(ranks)} ranks, and it takes two: run `pedyra compare` with method lora "
            f"and budgets: [1, 2, 4, 8]"
        )
    for row in loras:  # runs are named from the folder on, which may have been moved
        row |= {"run": comparison / row["run"], "data": comparison / "data" / row["task"]}
        opened(row["run"], row["data"])  # what is wrong with one is told before anything is measured
    tuning = read_rows(comparison / "tuning.jsonl", _SHAPE)
    for large in loras:
        if large["budget"] == ranks[-1]:
            same = [row for row in loras if (row["task"], row["seed"]) == (large["task"], large["seed"])]
            for row in _against(large, [row for row in same if row is not large], tuning, recoveries, rows):
                yield {"comparison": str(comparison), "rows": rows, **row}


def _against(
    large: Row, smaller: Sequence[Row], tuning: Sequence[Row], recoveries: Sequence[int], rows: int
) -> Iterator[Row]:
    trained = TrainedLora(large["run"], rows, data=large["data"])
    began = time.perf_counter()
    calibration = trained.calibration
    calibrating = time.perf_counter() - began
    batches = list(trained.training)
    for row in sorted(smaller, key=lambda each: -each["budget"]):
        other = TrainedLora(row["run"], data=row["data"])
        size = trained.ladder.point(trained.ladder.within(other.parameters))
        tuned = [each for each in tuning if all(each[key] == row[key] for key in ("method", "task", "budget"))]
        for steps in recoveries:
            began = time.perf_counter()
            factors = cut_factors(trained.model, calibration, size.ranks)
            if steps:
                factors = distill(trained.judge, factors, batches, steps)
            seconds = calibrating + time.perf_counter() - began
            cut = trained.losses(partial(recovered, trained.model, factors))
            less = paired(cut, other.whole, trained.weights)
            yield {
                **{key: large[key] for key in ("task", "seed")},
                "rank": large["budget"], "smaller_rank": row["budget"], "recover_steps": steps,
                "parameters": size.parameters, "lora_parameters": other.parameters,
                "loss": trained.mean(cut), "lora_loss": trained.mean(other.whole),
                "whole_loss": trained.mean(trained.whole),
                "lora_less_cut": less.mean, "standard_error": less.error,
                "seconds": seconds, "training_seconds": large["seconds"],
                "sweep_seconds": row["seconds"] + sum(each["seconds"] for each in tuned),
            }  # fmt: skip


SCALES = (0.9, 0.8, 0.7)
CUT_SHARES = (0.9, 0.85, 0.8)
GENERAL_ROWS = 192


def bench_forgetting(runs: Sequence[Path], general: Sequence[Any], rows: int = 1024) -> Iterator[dict[str, Any]]:
    """One row for each run and way to forget less: the loss of the task, and that of general text.

    Ways: `base` and `whole`; `scaled`, the whole adapter times `amount`; `task` and `general`, what is left of a cut to
    this part of the parameters, in the order of `pedyra fit` and in that of `pedyra fit --general`.

    Args:
        general: texts, or rows with the column `text`; half of them say what harms them, and half are measured on.
        rows: of training, to calibrate with, at most.
    """
    texts = texts_of(general)[:GENERAL_ROWS]
    if len(texts) < 4 * BATCH:
        raise ValueError(f"general has {len(texts)} texts, and it takes at least {4 * BATCH}; give more")
    for run in runs:  # what is wrong with one is told before anything is measured
        recipe, _, tokenizer, _ = opened(run)
        if recipe.data.kind != "causal_lm":
            raise ValueError(
                f"{run} is of data.kind {recipe.data.kind}, and general text is for a model that writes; give runs of "
                f"causal_lm"
            )
        text_batches(tokenizer, texts, BATCH)
    for run in runs:
        trained = TrainedLora(run, rows)
        batches = text_batches(trained.tokenizer, texts, BATCH)
        for row in _forgetting(trained, batches[::2], batches[1::2]):
            yield {"run": str(run), "rows": rows, **row}


def _forgetting(trained: TrainedLora, slopes: Sequence[Batch], held: Sequence[Batch]) -> Iterator[Row]:
    weights = [trained.judge.samples(batch) for batch in held]
    none = [0.0] * len(held)

    def row(way: str, asked: float, cut: Cut, share: float | None = None) -> Row:
        general = list(trained.judge.losses(held, cut))
        losses = trained.mean(trained.losses(cut)), paired(none, general, weights).mean
        amount = asked if share is None else share
        return {"way": way, "asked": asked, "amount": amount, "loss": losses[0], "general_loss": losses[1]}

    yield row("base", 0.0, partial(disabled, trained.model))
    yield row("whole", 1.0, partial(evaluating, trained.model))
    for scale in SCALES:
        yield row("scaled", scale, partial(_scaled, trained, scale))
    training = list(trained.training)
    of_task, of_text = (slopes_at_half(trained.judge, each, trained.calibration) for each in (training, slopes))
    for way, shares in (("general", CUT_SHARES), ("task", SHARES[:1])):
        calibration = trained.calibration
        if way == "general":
            calibration, _ = harm_first(calibration, of_task, of_text)
        ladder = Ladder(calibration, Shape())
        for share in shares:
            size = ladder.point(ladder.at(share))
            yield row(way, share, partial(truncated, trained.model, calibration, size.ranks), size.share)


@contextmanager
def _scaled(trained: TrainedLora, scale: float) -> Iterator[None]:
    """While it lasts, each layer adds this part of what the adapter gives."""
    with evaluating(trained.model), scaled(trained.model, scale):
        yield

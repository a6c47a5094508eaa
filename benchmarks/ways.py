"""Ways to cut a trained LoRA, and ways to repair what is left: `python -m benchmarks.ways measure RUN... --out FOLDER`.

Every combination of a way, a repair and a size is measured on the same held-out rows of a finished run, in pairs with
the whole adapter, and written as soon as it is known; a second start leaves out what is there. FOLDER gets `rows.jsonl`
and, for paired differences between ways, `losses/RUN.jsonl` with the loss of every batch. `python -m benchmarks.ways
table FOLDER` compares the ways.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from pedyra.app.models.base import load_tokenizer, positions
from pedyra.app.runs.evaluate import adapted_model, check_training_rows, finished_run
from pedyra.app.tasks.task import load_task
from pedyra.fitting.calibration import disabled, evaluating, lora_layers, measuring
from pedyra.fitting.curve import Ladder
from pedyra.fitting.cut import cut_to, evened
from pedyra.fitting.gramians import Calibration, Gramians
from pedyra.fitting.judge import Batch, Cut, DivergenceJudge, Judge, model_outputs
from pedyra.fitting.recover import distill
from pedyra.fitting.repair import DAMPING, compensation, mixings
from pedyra.fitting.verdict import Factors, Increase, paired
from pedyra.fitting.wanted import Shape
from pedyra.fitting.worth import Balance, in_basis
from pedyra.lora.layer import rank_parameters

WAYS = ("fit", "uniform", "energy", "balanced uniform")
REPAIRS = ("none", "gates", "mixing", "distil 160", "mixing + distil 40")
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)


class Trained:
    """The LoRA of a finished run, the held-out batches that it is judged by, and its calibration.

    Args:
        rows: of training, to calibrate and to recover with, at most.
        held_out: rows to be judged by, at most; a third of them are of the choice.
        batch: rows of a batch of training, and of those held out.
        out: folder that keeps the calibration.
    """

    def __init__(self, run: Path, rows: int, held_out: int, batch: tuple[int, int], out: Path) -> None:
        self.run, self.out = run, out
        folder, recipe, adapter = finished_run(run)
        tokenizer = load_tokenizer(recipe.model)
        task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
        check_training_rows(folder, recipe, task)
        self.model: Any = adapted_model(recipe, adapter, task.num_labels, tokenizer)
        self.judge = Judge(self.model)
        generator = torch.Generator().manual_seed(recipe.seed)

        def batches(part: Any, chosen: list[int], size: int) -> list[Batch]:
            loader = DataLoader(
                part.select(chosen), batch_size=size, collate_fn=lambda found: dict(task.collator(found))
            )
            return list(loader)

        drawn = torch.randperm(len(task.train), generator=generator)[:rows].tolist()
        self.training = batches(task.train, drawn, batch[0])
        drawn = torch.randperm(len(task.eval), generator=generator)[:held_out].tolist()
        parts = {"choice": drawn[: len(drawn) // 3], "proof": drawn[len(drawn) // 3 :]}
        # Rows of like length share a batch, which is then padded little.
        length = {row: len(ids) for row, ids in enumerate(task.eval["input_ids"])}
        of_parts = {
            key: batches(task.eval, sorted(rows, key=length.__getitem__), batch[1]) for key, rows in parts.items()
        }
        self.choices = len(of_parts["choice"])
        self.held = [*of_parts["choice"], *of_parts["proof"]]
        self.weights = [self.judge.samples(each) for each in self.held]

    def losses(self, cut: Cut) -> list[float]:
        """Of each held-out batch."""
        return list(self.judge.losses(self.held, cut))

    @cached_property
    def layers(self) -> dict[str, Any]:
        return lora_layers(self.model)

    @cached_property
    def whole(self) -> Factors:
        """Layer -> A `(r, in)` and B `(out, r)`, in double precision."""
        return {
            name: (module.lora_A["default"].weight.detach().double(), module.lora_B["default"].weight.detach().double())
            for name, module in self.layers.items()
        }

    @property
    def floats(self) -> Factors:
        """The same in single precision."""
        return {name: (A.float(), B.float()) for name, (A, B) in self.whole.items()}

    def summed(self, judge: Judge, name: str, batches: Sequence[Batch]) -> tuple[Gramians, float]:
        """The sums of a pass over these batches, and its processor seconds; kept under this name."""
        slots = {name: module.lora_A["default"] for name, module in self.layers.items()}
        gramians = Gramians({name: slot.weight for name, slot in slots.items()}, blocks=len(batches))
        file = self.out / "calibration" / f"{self.run.name} {name}.safetensors"
        if file.is_file():
            found = load_file(file)
            seconds = float(found.pop("seconds"))
            gramians.load(found)
            return gramians, seconds
        began = time.process_time()
        torch.manual_seed(0)
        with measuring(judge, slots, gramians, set()) as measure:
            for batch in batches:
                measure(batch)
        seconds = time.process_time() - began
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({**gramians.tensors(), "seconds": torch.tensor(seconds)}, file)
        return gramians, seconds

    @cached_property
    def calibration(self) -> tuple[Calibration, dict[str, Tensor], float]:
        """What `pedyra fit` measures, K `(batches, r, r)` of every layer, and the processor seconds of it."""
        gramians, seconds = self.summed(self.judge, "labels", self.training)
        sizes = {
            name: rank_parameters(module.lora_A["default"].weight.shape[1], module.lora_B["default"].weight.shape[0])
            for name, module in self.layers.items()
        }
        return gramians.calibration(sizes), self.products(gramians), seconds

    def products(self, gramians: Gramians) -> dict[str, Tensor]:
        """K of every layer, in double precision."""
        return {name: gramians.tensors()[f"K.{name}"].double() for name in self.layers}

    @cached_property
    def said(self) -> tuple[Tensor, dict[str, Tensor], float]:
        """Samples of each batch, K and seconds as `calibration`, of labels that the whole adapter itself would give."""
        judge = DivergenceJudge(self.model, model_outputs, lambda: evaluating(self.model))
        gramians, seconds = self.summed(judge, "said", self.training)
        return gramians.tensors()["samples"], self.products(gramians), seconds

    def directions(self, way: str) -> tuple[Calibration, Shape]:
        """The directions of every layer in the order in which they stay, and the shape of the sizes."""
        measured, products, _ = self.calibration
        if way in ("fit", "balanced uniform"):
            return measured, Shape(same_rank=way != "fit")
        if way == "order by what is left":
            return after_compensation(measured), Shape()
        layers = {}
        for name, layer in measured.layers.items():
            A, B = self.whole[name]
            basis = singular(A, self.layers[name].scaling["default"] * B)
            layers[name] = replace(layer, basis=basis, products=in_basis(products[name], basis), tokens_per_sample=1.0)
        return replace(measured, layers=layers), Shape(same_rank=way == "uniform")


def singular(A: Tensor, B: Tensor) -> Balance:
    """The singular vectors of B A as a basis of its r directions, without a matrix of the layer's size.

    Args:
        A: `(r, in)`.
        B: `(out, r)`, times the scaling.
    """
    left, right = torch.linalg.qr(A.T).R, torch.linalg.qr(B).R
    U, S, Vh = torch.linalg.svd(right @ left.T)
    floor = S.clamp_min(1e-12 * S[0].clamp_min(1e-30)).sqrt()
    T = torch.linalg.solve(left, Vh.T).T * floor[:, None]  # S^1/2 V^T R_A^-T
    return Balance(T, (left.T @ Vh.T) / floor, S)


def after_compensation(measured: Calibration, damping: float = 0.01) -> Calibration:
    """The directions in the order in which they go when each time that one goes whose removal costs least, per
    parameter, after the gates of all that are left have made up for it."""
    samples = measured.samples.double()
    slopes = torch.cat([layer.slopes for layer in measured.layers.values()], 1)
    slopes = slopes * (samples / len(samples)).sqrt()[:, None]
    F = slopes.T @ slopes
    inverse = torch.linalg.inv(F + damping * F.diagonal().mean() * torch.eye(len(F)).double())
    parameters = torch.cat([torch.full((layer.rank,), layer.parameters) for layer in measured.layers.values()])
    gates, going = torch.ones(len(F)).double(), []
    left = torch.ones(len(F), dtype=torch.bool)
    for _ in range(len(F)):
        cost = gates.square() / inverse.diagonal().clamp_min(1e-300) / parameters
        gone = int(torch.where(left, cost, math.inf).argmin())
        going.append(gone)
        left[gone] = False
        column = inverse[:, gone].clone()
        gates = (gates - gates[gone] / column[gone] * column) * left
        inverse = inverse - torch.outer(column, column) / column[gone]
    worth = torch.empty(len(F)).double()
    worth[torch.tensor(going)] = torch.arange(1, len(F) + 1).double()
    parts = worth.split([layer.rank for layer in measured.layers.values()])
    named = zip(measured.layers.items(), parts, strict=True)
    return replace(measured, layers={name: layer.reordered(part) for (name, layer), part in named})


def cut(trained: Trained, calibration: Calibration, ranks: Mapping[str, int], moves: Mapping[str, Tensor]) -> Factors:
    """Factors with so many ranks of each layer, moved by X: A_k + X_kr A_r and B_k + B X_.k in its basis."""
    found = {}
    for name, (A, B) in trained.whole.items():
        basis, rank = calibration.layers[name].basis, ranks[name]
        A, B = basis.T @ A, B @ basis.inverse
        rows, columns = A[:rank], B[:, :rank]
        if name in moves:
            rows, columns = rows + moves[name][:rank, rank:] @ A[rank:], columns + B @ moves[name][:, :rank]
        found[name] = tuple(each.float() for each in (evened(rows, columns) if rank else (rows, columns)))
    return found


def measure(trained: Trained, way: str, repair: str, share: float) -> tuple[dict[str, Any], list[float]]:
    """Size and processor seconds of a combination, and the loss of each held-out batch."""
    calibration, shape = trained.directions(way)
    ladder = Ladder(calibration, shape)
    size = ladder.point(ladder.at(share))
    first, *rest = repair.split(" + ")
    distillation = rest[0] if rest else first
    began = time.process_time()
    moves = {} if first.startswith(("none", "distil")) else repaired(trained, calibration, size.ranks, first)
    factors = cut(trained, calibration, size.ranks, moves)
    repair_seconds = time.process_time() - began
    began = time.process_time()
    if distillation.startswith("again"):
        factors = second_step(trained, factors, int(distillation.split()[1]))
    if distillation.startswith("distil"):
        factors = distill(trained.judge, factors, trained.training, int(distillation.split()[1]))
    distillation_seconds = time.process_time() - began
    needed = bool(moves) or way not in ("uniform", "energy")
    row = {
        "share": size.share, "parameters": size.parameters, "repair_seconds": repair_seconds,
        "calibration_seconds": trained.calibration[2] if needed else 0.0, "distillation_seconds": distillation_seconds,
    }  # fmt: skip
    return row, trained.losses(partial(cut_to, trained.model, factors))


def repaired(trained: Trained, calibration: Calibration, ranks: Mapping[str, int], repair: str) -> dict[str, Tensor]:
    """Layer -> X `(r, r)` of a repair in closed form: `gates`, `mixing`, or `span`, where A_k takes of A_r and B_k of
    B_r; with `said` by labels that the whole adapter itself would give, and with a number as damping."""
    kind, *options = repair.split()
    samples, products, _ = trained.said if "said" in options else (calibration.samples, *trained.calibration[1:])
    damping = next((float(option) for option in options if option[0].isdigit()), DAMPING)
    bases = {name: layer.basis for name, layer in calibration.layers.items()}
    if kind == "span":
        return spanning(products, samples, bases, ranks, damping)
    along = {name: in_basis(products[name], basis) for name, basis in bases.items()}
    found = mixings(along, samples, ranks, gates=kind == "gates", damping=damping)
    moves = {}
    for name, M in found.items():
        moves[name] = torch.zeros_like(bases[name].T)
        moves[name][: len(M), : len(M)] = M
    return moves


def spanning(
    products: Mapping[str, Tensor],
    samples: Tensor,
    bases: Mapping[str, Balance],
    ranks: Mapping[str, int],
    damping: float,
) -> dict[str, Tensor]:
    """Layer -> X `(r, r)`, all of whose rows and columns of the kept directions are free; dL/dX = K'^T, as of M."""
    root = samples.double().sqrt()[:, None]
    kept, removed, free = [], torch.zeros(len(samples)).double(), {}
    for name, basis in bases.items():
        K = in_basis(products[name], basis).mT
        removed += K.diagonal(dim1=1, dim2=2)[:, ranks[name] :].sum(1)
        free[name] = torch.ones_like(basis.T, dtype=torch.bool)
        free[name][ranks[name] :, ranks[name] :] = False
        kept.append(root * K[:, free[name]])
    found = compensation(torch.cat(kept, 1), root[:, 0] * removed, damping)
    moves = {}
    for (name, mask), part in zip(free.items(), found.split([each.shape[1] for each in kept]), strict=True):
        moves[name] = torch.zeros(mask.shape, dtype=torch.float64)
        moves[name][mask] = part
    return moves


def second_step(trained: Trained, factors: Factors, batches: int, damping: float = DAMPING) -> Factors:
    """One step of Gauss and Newton from a cut towards what the whole adapter says, linearised at the cut.

    What is missing of the logits, u, and the change of the logits along the parameters are both seen through the
    gradient of what the cut itself would say, drawn at random for each batch: so their products are those of the
    Fisher information in the mean, and the step is the ridge regression of one on the other.
    """
    missing: list[Tensor] = []

    class OfTheCut(Judge):
        def trained_loss(self, batch: Batch) -> Tensor:
            with torch.no_grad(), cut_to(self.model, trained.floats):
                (teacher,) = self.outputs(batch)
            (logits,) = self.outputs(batch)
            logits, teacher = logits.float().flatten(0, -2), teacher.float().flatten(0, -2)
            chances = logits.detach().softmax(-1)
            drawn = torch.multinomial(chances, 1).squeeze(-1)
            score = torch.nn.functional.one_hot(drawn, logits.shape[-1]) - chances
            missing.append((score * (teacher - logits.detach())).sum(-1).mean())
            return torch.nn.functional.cross_entropy(logits, drawn)

    judge = OfTheCut(trained.model, outputs=model_outputs)
    torch.manual_seed(0)
    with cut_to(trained.model, factors):
        slots = {name: module.lora_A["default"] for name, module in lora_layers(trained.model).items()}
        gramians = Gramians({name: slot.weight for name, slot in slots.items()}, blocks=batches)
        with measuring(judge, slots, gramians, set()) as measure:
            for batch in trained.training[:batches]:
                measure(batch)
    tensors = gramians.tensors()
    root = tensors["samples"].double().sqrt()
    slopes = [-root[:, None] * tensors[f"K.{name}"].double().mT.flatten(1) for name in factors]
    found = compensation(torch.cat(slopes, 1), root * torch.stack(missing).double(), damping)
    moved = {}
    for (name, (A, B)), part in zip(factors.items(), found.split([each.shape[1] for each in slopes]), strict=True):
        moved[name] = (A, B + B @ part.view(len(A), len(A)).float())
    return moved


def run_measure(asked: argparse.Namespace) -> None:
    """Measure what is asked for and not yet there."""
    torch.set_num_threads(1)  # processor seconds are then seconds of one core
    rows_file = asked.out / "rows.jsonl"
    for run in asked.runs:
        there = {key(row) for row in read(rows_file) if row["adapter"] == run.name}
        missing = [each for each in product(asked.shares, asked.repairs, asked.ways) if each not in there]
        if not missing:
            continue
        trained = Trained(run, asked.rows, asked.held_out, asked.batch, asked.out)
        losses_file = asked.out / "losses" / f"{run.name}.jsonl"
        before = references(trained, losses_file)
        for share, repair, way in missing:
            began = time.process_time()
            found, losses = measure(trained, way, repair, share)
            total = time.process_time() - began
            row: dict[str, Any] = {"adapter": run.name, "way": way, "repair": repair, "asked": share, **found}
            for part, chosen in parts(trained.choices).items():
                rise = paired(before[chosen], losses[chosen], trained.weights[chosen])
                row |= {part: rise.mean, f"{part}_error": rise.error}
            append(losses_file, {"way": way, "repair": repair, "asked": share, "losses": losses})
            append(rows_file, row)
            print(
                f"{run.name} {share} {repair} {way}: {row['all']:+.4f} +- {row['all_error']:.4f}, {total:.0f} s",
                flush=True,
            )


def references(trained: Trained, file: Path) -> list[float]:
    """Losses of the whole adapter; those of the base model are written beside them."""
    there = {row["way"]: row for row in read(file)}
    for way, judged in (("whole", evaluating), ("base", disabled)):
        if way not in there:
            losses = trained.losses(partial(judged, trained.model))
            there[way] = {"way": way, "losses": losses, "weights": trained.weights, "choices": trained.choices}
            append(file, there[way])
    won = paired(there["whole"]["losses"], there["base"]["losses"], trained.weights)
    print(f"{trained.run.name}: the adapter won {won.mean:.4f} +- {won.error:.4f}", flush=True)
    return there["whole"]["losses"]


def parts(choices: int) -> dict[str, slice]:
    """Of the held-out batches, the first of which are those of the choice."""
    return {"choice": slice(choices), "proof": slice(choices, None), "all": slice(None)}


def key(row: Mapping[str, Any]) -> tuple[float, str, str]:
    return row["asked"], row["repair"], row["way"]


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file; none where there is no file, and without a last one that was not written to its end."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(file: Path, row: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def run_table(asked: argparse.Namespace) -> None:
    """Print, for each size and repair, the rise of each way, and by how much the others are above the first; write the
    rows with that difference where a file is asked for."""
    measured = {file.stem: read(file) for file in sorted((asked.out / "losses").glob("*.jsonl"))}
    print("| size | repair | way | adapters | rise | above the first | part of what was won |")
    print("|---|---|---|---|---|---|---|")
    for share, repair in product(asked.shares, asked.repairs):
        for way in (*asked.ways, "better of two"):
            found = [compared(rows, share, repair, asked.ways, way) for rows in measured.values()]
            found = [each for each in found if each is not None]
            if found:
                rise, above, part = (mean_interval([each[i] for each in found]) for i in range(3))
                print(f"| {share:g} | {repair} | {way} | {len(found)} | {rise} | {above} | {part} |")
    if asked.write is not None:
        asked.write.unlink(missing_ok=True)
        for row in read(asked.out / "rows.jsonl"):
            share, repair, way = key(row)
            found = compared(measured[row["adapter"]], share, repair, asked.ways, way)
            above = {} if found is None else {"above_first": found[1].mean, "above_first_error": found[1].error}
            row |= above
            append(
                asked.write, {name: round(each, 6) if isinstance(each, float) else each for name, each in row.items()}
            )


def compared(
    rows: Sequence[Mapping[str, Any]], share: float, repair: str, ways: Sequence[str], way: str
) -> tuple[Increase, Increase, Increase] | None:
    """Of one adapter the rise with a way, how far it is above the first of all ways, and the same as a part of what the
    adapter won; None where not all ways were measured.

    The better of two is the first or the second way, whichever rose less on the rows of the choice, and is judged by
    those of the proof; every other way by all rows."""
    references = {row["way"]: row for row in rows if row["way"] in ("whole", "base")}
    losses = {row["way"]: row["losses"] for row in rows if (row.get("asked"), row.get("repair")) == (share, repair)}
    if any(each not in losses for each in ways):
        return None
    whole, weights, choices = (references["whole"][key] for key in ("losses", "weights", "choices"))
    choice, proof, everything = parts(choices).values()
    judged = proof if way == "better of two" else everything
    if way == "better of two":
        way = min(ways[:2], key=lambda each: paired(whole[choice], losses[each][choice], weights[choice]).mean)
    rise = paired(whole[judged], losses[way][judged], weights[judged])
    above = paired(losses[ways[0]][judged], losses[way][judged], weights[judged])
    won = paired(whole[everything], references["base"]["losses"][everything], weights).mean
    return rise, above, Increase(above.mean / won, above.error / won, above.batches)


def mean_interval(found: Sequence[Increase]) -> str:
    """The mean over adapters, and half of its interval (95 %) by the rows of each: adapters are taken as they are."""
    error = sum(each.error**2 for each in found) ** 0.5 / len(found)
    return f"{mean(each.mean for each in found):+.4f} ± {1.96 * error:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ways", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure", help="measure ways, repairs and sizes of finished runs")
    command.set_defaults(does=run_measure)
    command.add_argument("runs", nargs="+", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--ways", nargs="+", default=WAYS)
    command.add_argument("--repairs", nargs="+", default=REPAIRS)
    command.add_argument("--shares", nargs="+", type=float, default=SHARES)
    command.add_argument("--rows", type=int, default=1024, help="of training, to calibrate and to distil with")
    command.add_argument("--batch", nargs=2, type=int, default=(8, 8), help="rows of a batch of training, and held out")
    command.add_argument("--held-out", type=int, default=900, help="a third is of the choice")
    command = commands.add_parser("table", help="compare the ways with the first of them")
    command.set_defaults(does=run_table)
    command.add_argument("out", type=Path)
    command.add_argument("--write", type=Path, help="file for the rows")
    command.add_argument("--ways", nargs="+", default=WAYS)
    command.add_argument("--repairs", nargs="+", default=REPAIRS)
    command.add_argument("--shares", nargs="+", type=float, default=SHARES)
    asked = parser.parse_args(arguments)
    asked.does(asked)


if __name__ == "__main__":
    main()

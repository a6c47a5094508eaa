"""`pedyra fit`: from an adapter on disk, and rows, to the smaller adapter on disk with its proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pedyra.app.models import load_model, load_tokenizer, positions
from pedyra.app.recipe import Recipe, check_recipe, load_recipe
from pedyra.app.tasks import Task, load_task
from pedyra.fitting.curve import Shape, by_type
from pedyra.fitting.cut import check_out, cut_folder, singular_basis
from pedyra.fitting.fit import Fit, Progress, fit_adapter
from pedyra.fitting.recover import check_steps
from pedyra.lora.folder import SavedLora, check_plain, load_adapter, read_lora
from pedyra.lora.layer import rank_parameters

CURVE = "pedyra_fit_curve.jsonl"
"""Beside the smaller adapter: one row a size of the curve."""

KINDS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}
"""PEFT's task_type -> data.kind."""

COLUMNS: dict[str, dict[str, Any]] = {
    "classification": {"text": "text", "label": "label"},
    "causal_lm": {"prompt": "prompt", "completion": "completion"},
}
"""The columns that rows without a recipe have."""

BATCH = 8
"""Rows of a batch: the proof is paired batch by batch, so small ones make a better standard error."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for."""

    tolerance: float = 0.01
    parameters: int | None = None
    max_rank: int | None = None
    same_rank: bool = False
    multiple_of: int = 1
    drop_types: Sequence[str] = ()
    recover: int = 0

    def __post_init__(self) -> None:
        check_steps(self.recover)

    def shape(self, lora: SavedLora) -> Shape:
        """The same as what the ranks of this adapter have to look like."""
        names = [layer.name for layer in lora.layers]
        more = any({"magnitude", "bias"} & layer.keys.keys() for layer in lora.layers)
        if more and self.drop_types:
            raise ValueError("drop_types empties layers, but each layer of this adapter has a magnitude or a bias too")
        return Shape(
            max_rank=self.max_rank,
            same_rank=self.same_rank,
            multiple_of=self.multiple_of,
            drop=by_type(self.drop_types, names) if self.drop_types else None,
            least=int(more),
        )


def fit_folder(
    path: Path,
    wanted: Wanted,
    out: Path,
    *,
    data: Path | None = None,
    run: Path | None = None,
    rows: int = 1024,
    max_length: int | None = None,
    progress: Progress = lambda words: None,
) -> Fit:
    """Fit the adapter in `path` (a run folder, or a PEFT folder) on rows, and write the smaller one to `out`.

    Args:
        data: a file of rows with the columns of the run's recipe, or, without a run, of COLUMNS; half of them
            calibrate, two thirds of the other half are for the choice, and the rest for the proof.
        run: the run folder that says model and data, where `path` is not one: training rows calibrate, and of
            the held-out ones two thirds are for the choice, and the rest for the proof.
        max_length: tokens of a row without a run, at most; None: as many as the base and its tokenizer take.
        rows: to calibrate with, and for the choice, at most; half as many for the proof.

    Raises:
        ValueError: no data, an adapter that is no plain LoRA, a base that cannot be found, `out` that holds files.
    """
    check_out(out)
    lora = read_lora(path)
    check_plain(lora)
    shape = wanted.shape(lora)
    recipe = _recipe(path, lora, data, run, max_length)
    progress("reading rows")
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    progress("loading the model")
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    model = load_adapter(base, lora.folder)
    calibration, choice, proof = parts(task, rows, recipe.seed)
    found = fit_adapter(
        model, calibration, choice, proof, tolerance=wanted.tolerance, parameters=wanted.parameters, shape=shape,
        recover=wanted.recover, progress=progress,
    )  # fmt: skip
    bases = {name: layer.basis for name, layer in found.calibration.layers.items()}
    cut_folder(lora, bases, found.ranks, out, {**found.row(), "words": found.words}, found.factors)
    curve = "".join(json.dumps(row) + "\n" for row in found.curve_rows())
    (out / CURVE).write_text(curve, encoding="utf-8")
    return found


def truncate_folder(path: Path, wanted: Wanted, out: Path) -> dict[str, int]:
    """Without data: cut by the singular values of each layer's update, largest first per parameter; nothing is proved.

    Raises:
        ValueError: no size was given, which is all that there is to go by; steps of recovery, which take rows.
    """
    lora = read_lora(path)
    if wanted.parameters is None and wanted.max_rank is None:
        raise ValueError(
            "there are no rows to measure a cost on; give --data ROWS.jsonl or --run RUN, or say the size: "
            "--parameters N or --max-rank R"
        )
    if wanted.recover:
        raise ValueError("--recover trains on rows, and there are none; give --data ROWS.jsonl or --run RUN")
    check_out(out)
    check_plain(lora)
    shape = wanted.shape(lora)
    bases = {}
    entries: list[tuple[float, int, str]] = []
    price = {}
    for position, layer in enumerate(lora.layers):
        A, B = lora.tensors[layer.keys["A"]], lora.tensors[layer.keys["B"]]
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(
                f"the adapter's {layer.name} has a weight that is not finite; it has diverged, or is damaged"
            )
        bases[layer.name] = singular_basis(A, B)
        price[layer.name] = rank_parameters(A.shape[1], B.shape[0])
        energies = (layer.scaling * bases[layer.name].values).square() / price[layer.name]
        entries += [(float(value), position, layer.name) for value in energies]
    ranks = {layer.name: shape.most(layer.name, layer.rank) for layer in lora.layers}
    if wanted.same_rank:
        common = min(rank for rank in ranks.values() if rank)
        ranks = {name: min(rank, common) for name, rank in ranks.items()}
    left = {layer.name: layer.rank for layer in lora.layers}
    for _, _, name in sorted(entries):
        if wanted.parameters is None or sum(price[n] * r for n, r in ranks.items()) <= wanted.parameters:
            break
        left[name] -= 1
        ranks[name] = min(ranks[name], shape.rounded(left[name], ranks[name]))
    cut_folder(lora, bases, ranks, out, {"ranks": ranks, "by": "singular values", "measured_cost": None})
    return ranks


def _recipe(path: Path, lora: SavedLora, data: Path | None, run: Path | None, max_length: int | None) -> Recipe:
    """Model and data: a run's, or those that the adapter and the rows name."""
    if run is not None and not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is no run folder (it has no recipe.yaml); give the output_dir of a training run")
    folder = next((each for each in (run, path) if each is not None and (each / "recipe.yaml").is_file()), None)
    if folder is not None:
        recipe = load_recipe(folder / "recipe.yaml")
        if data is None:
            return recipe
        content = recipe.model_dump()
        content["data"] |= {
            "max_length": max_length or recipe.data.max_length,
            "source": str(data),
            "validation": None,
            "validation_fraction": 0.5,
        }
        return check_recipe(content, str(folder))
    if data is None:
        raise ValueError(f"{path} says nothing of its data; give --data ROWS.jsonl, or --run RUN")
    kind = KINDS.get(str(lora.config.get("task_type")))
    if kind is None:
        raise ValueError(
            f"the adapter's task_type is {lora.config.get('task_type')!r}; rows without a run are read for "
            f"{' and '.join(KINDS)}: give --run RUN, whose recipe says what the columns mean"
        )
    name = lora.config.get("base_model_name_or_path")
    if not name:
        raise ValueError("the adapter names no base model (base_model_name_or_path); give --run RUN, which does")
    content = {
        "name": "fit",
        "model": {"name": name},
        "data": {
            "source": str(data),
            "kind": kind,
            **COLUMNS[kind],
            "validation_fraction": 0.5,
            "max_length": max_length,
        },
    }
    return check_recipe(content, str(data))


def parts(task: Task, rows: int, seed: int) -> tuple[DataLoader[Any], list[Any], list[Any]]:
    """Batches for calibration (training rows), choice and proof: two thirds of the held-out rows and the other third,
    since the choice has to tell sizes apart, and the proof tells what one of them costs."""
    generator = torch.Generator().manual_seed(seed)
    train = task.train.select(torch.randperm(len(task.train), generator=generator)[:rows].tolist())
    held = torch.randperm(len(task.eval), generator=generator)[: rows + rows // 2].tolist()
    proved = held[2::3]
    if len(proved) < 2 * BATCH:
        raise ValueError(f"{len(held)} rows are held out; the proof is a third and takes {2 * BATCH}: give more")

    def batches(part: Any) -> DataLoader[Any]:
        return DataLoader(part, batch_size=BATCH, collate_fn=lambda found: dict(task.collator(found)))

    chosen_by = [row for index, row in enumerate(held) if index % 3 != 2]
    choice, proof = (list(batches(task.eval.select(part))) for part in (chosen_by, proved))
    return batches(train), choice, proof

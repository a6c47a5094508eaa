"""`pedyra fit`: from an adapter on disk, and rows, to the smaller adapter on disk with its proof."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer

from pedyra.app.export.served import served_lines, served_together
from pedyra.app.models.base import class_names, load_model, load_tokenizer, names_model, positions
from pedyra.app.recipe import Recipe, check_recipe, load_recipe
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.runs.evaluate import check_training_rows
from pedyra.app.runs.run_folder import RunFolder, run_of
from pedyra.app.runs.setup import Setup, ready_to_fit, resolve
from pedyra.app.tasks.sources import read_test_rows
from pedyra.app.tasks.task import load_task
from pedyra.app.tasks.text import class_number
from pedyra.errors import UserError
from pedyra.export.destinations import Destination, base_name
from pedyra.export.loading import num_labels
from pedyra.fitting.cut import RECORD, check_out
from pedyra.fitting.result import Fit
from pedyra.fitting.wanted import Wanted
from pedyra.lora.folder import SavedLora, check_finite, load_adapter, read_lora
from pedyra.lora.inspection import find_adapter
from pedyra.lora.loaded import check_layers
from pedyra.methods.method import Adaptation
from pedyra.trainer.fit import check_asked, fit_trainer

KINDS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal_lm"}
"""PEFT's task_type -> data.kind."""

COLUMNS: dict[str, dict[str, Any]] = {
    "classification": {"text": "text", "label": "label"},
    "causal_lm": {"prompt": "prompt", "completion": "completion"},
}
"""The columns that rows without a recipe have; those of a language model may be `messages` instead."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows and the base of a fit come from, where the adapter's own folder does not say."""

    data: Path | None = None
    """A file of rows with the columns of the run's recipe, or, without a run, of COLUMNS; half of them calibrate."""
    run: Path | None = None
    """The run folder that says model and data: its training rows calibrate, and those held out are for the rest."""
    max_length: int | None = None
    """Tokens of a row of `data`, at most; None: as many as the base and its tokenizer take."""
    general: Path | None = None
    """A file of rows with the column `text`, which the model should not forget."""
    dtype: str | None = None
    """Of the base's weights, as `model.dtype` of a recipe, where no run says it."""
    quantization: str | None = None
    """Of the base's weights, as `model.quantization` of a recipe, where no run says it."""

    def loading(self, path: Path) -> dict[str, str]:
        """How the base of the adapter in `path` is loaded, as keys of `model`. ValueError where a run says it."""
        asked = {"dtype": self.dtype, "quantization": self.quantization}
        given = {key: value for key, value in asked.items() if value is not None}
        if given and (folder := self.folder(path)) is not None:
            raise UserError(f"the recipe of {folder} says how its base is loaded; leave out --{' and --'.join(given)}")
        return given

    def texts(self) -> list[Any] | None:
        """The rows of general text, if there are some. ValueError for a file that cannot be read."""
        if self.general is None:
            return None
        return read_test_rows(str(self.general), None, "train", ["text"], "--general")

    def folder(self, path: Path) -> Path | None:
        """The run folder that says model and data, if there is one. ValueError where `run` is none."""
        if self.run is None:
            return run_of(path)
        if not (self.run / "recipe.yaml").is_file():
            raise UserError(
                f"{self.run} is no run folder (it has no recipe.yaml); give the output_dir of a training run"
            )
        return self.run


def fit_folders(
    outs: Mapping[Path, Path],
    wanted: Wanted,
    source: Source,
    *,
    place: Destination | None = None,
    overwrite: bool = False,
    shown: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> list[Fit]:
    """`fit_folder` of each adapter -> the folder for the smaller one; then the lines by which one server has them all.

    Raises:
        UserError: as of `fit_folder`; adapters of different bases.
    """
    bases = {path: base_name(read_lora(path)) for path in outs}
    if len({*bases.values()}) > 1:
        first, other, *_ = dict.fromkeys(bases.values())
        raise UserError(f"one server has one base, and these adapters are of {first} and of {other}; fit them apart")
    for out in outs.values():
        check_out(out, overwrite)
    fits = {}
    for path, out in outs.items():
        if len(outs) > 1:
            told(f"\n{path}")
        found = fit_folder(path, wanted, out, source, place=place, overwrite=overwrite, shown=shown, told=told)
        fits[path.name if path.name not in fits else f"{path.name}-{len(fits)}"] = out, found
        told(f"adapter     {out}")
    if place is not None and len(fits) > 1:
        folders = {name: out for name, (out, _) in fits.items()}
        for line in ("", f"all {len(fits)} on one server", *served_together(place, folders)):
            told(line)
    return [found for _, found in fits.values()]


def fit_folder(
    path: Path,
    wanted: Wanted,
    out: Path,
    source: Source,
    *,
    place: Destination | None = None,
    overwrite: bool = False,
    shown: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Fit the adapter in `path` (a run folder, or a PEFT folder) on rows, and write the smaller one to `out`.

    Args:
        place: where it will be served: at the least of its ranks that is proved, or at the one that is named whatever
            that does to the loss, and in the form that it reads.
        overwrite: replace an earlier fit in `out`.
        shown: a progress bar beside the estimate of the time, which is told in any case.
        told: gets what was found, before it is written.

    Raises:
        UserError: no data, an adapter that is no plain LoRA, a base that cannot be found, `out` that holds files, no
            rank of the place within tolerance.
    """
    check_out(out, overwrite)
    general = source.texts()
    check_asked(wanted, place, general)
    if wanted.rank is None:
        _check_whole(path)
    with opened(path, wanted, source, shown=shown) as (trainer, lora):
        found = fit_trainer(trainer, wanted, place=place, general=general)
        told(str(found))
        found.write(lora, out)
        for line in () if place is None else served_lines(found, lora, place, out):
            told(line)
    return found


def _check_whole(path: Path) -> None:
    """Refuse what a fit has made smaller already, where the whole adapter is there too: the tolerance of a second fit
    would be added to that of the first. Where it is gone, that is a warning."""
    folder = find_adapter(path)
    if not (folder / RECORD).is_file():
        return
    told = f"{path} was made smaller by a fit already, and another one adds its tolerance to that"
    whole = folder.resolve().parent
    if any((place / "adapter_config.json").is_file() for place in (whole, whole / "adapter")):
        raise UserError(f"{told}; fit the whole adapter, {whole}, or give --rank")
    warnings.warn(f"{told}; fit the whole adapter if you have it", stacklevel=3)


@contextmanager
def opened(path: Path, wanted: Wanted, source: Source, *, shown: bool = False) -> Iterator[tuple[Trainer, SavedLora]]:
    """The adapter in `path`, and a Trainer that has it with its base and its rows; errors as of `fit_folder`."""
    lora = read_lora(path)
    lora.check_supported("fit")
    check_finite(lora)
    recipe = recipe_of(path, lora, source)
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    if source.data is None and (folder := source.folder(path)) is not None:
        check_training_rows(RunFolder(folder), recipe, task)
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    model = load_adapter(base, lora.folder)
    check_layers(lora, model)
    setup = Setup(recipe=recipe, tokenizer=tokenizer, task=task, adaptation=Adaptation(model=model))
    with TemporaryDirectory() as scratch:
        trainer = setup.trainer(scratch, report_to="none")
        trainer.args.disable_tqdm = not shown
        ready_to_fit(recipe, trainer)
        yield trainer, lora


def recipe_of(path: Path, lora: SavedLora, source: Source) -> Recipe:
    """Model and data: a run's, or those that the adapter and the rows name."""
    folder, data = source.folder(path), source.data
    loading = source.loading(path)
    if folder is not None:
        recipe = resolve(load_recipe(folder / "recipe.yaml"))
        if source.run is not None:
            _tell_other_base(lora, recipe.model, folder)
        if data is None:
            return recipe
        content = recipe.model_dump()
        content["data"] |= {
            "max_length": source.max_length or recipe.data.max_length,
            "labels": recipe.data.labels or RunFolder(folder).recorded("classes"),  # else by the order of their names
            "source": str(data),
            # What the run took of its own data set, which may be one of the Hub.
            "config": None,
            "split": "train",
            "validation": None,
            "validation_fraction": 0.5,
            "train_rows": None,
            "eval_rows": None,
        }
        return check_recipe(content, str(folder))
    if data is None:
        raise UserError(f"{path} says nothing of its data; give --data ROWS.jsonl, or --run RUN")
    kind = KINDS.get(str(lora.config.get("task_type")))
    if kind is None:
        raise UserError(
            f"the adapter's task_type is {lora.config.get('task_type')!r}; rows without a run are read for "
            f"{' and '.join(KINDS)}: give --run RUN, whose recipe says what the columns mean"
        )
    name = lora.config.get("base_model_name_or_path")
    if not name:
        raise UserError("the adapter names no base model (base_model_name_or_path); give --run RUN, which does")
    columns = COLUMNS[kind]
    if kind == "causal_lm" and "messages" in next(iter(read_test_rows(str(data), None, "train", None, "--data")), ()):
        columns = {"messages": "messages"}
    model = {"name": name, "revision": lora.config.get("revision"), **loading}
    if (lora.folder / "tokenizer_config.json").is_file():  # that of the training, whose template chats were written by
        model["tokenizer"] = str(lora.folder)
    classes = _classes(ModelSection(**model), lora, data) if kind == "classification" else {}
    content = {
        "name": "fit",
        "model": model,
        "data": {
            **classes,
            "source": str(data),
            "kind": kind,
            **columns,
            "validation_fraction": 0.5,
            "max_length": source.max_length,
        },
    }
    return check_recipe(content, str(data))


def _tell_other_base(lora: SavedLora, model: ModelSection, folder: Path) -> None:
    """Warn where the adapter names another base than the run that it is measured with."""
    recorded = lora.config.get("base_model_name_or_path")
    if recorded and run_of(lora.folder) != folder and not names_model(recorded, model):
        warnings.warn(
            f"{lora.title} is an adapter of the base {recorded}, and the run {folder} is of {model.name}: if these are "
            f"not the same model, nothing that is measured here is about this adapter",
            stacklevel=3,
        )


def _classes(model: ModelSection, lora: SavedLora, data: Path) -> dict[str, Any]:
    """`num_labels`, or `labels` in the order of their numbers, of rows that no recipe tells of.

    Names are those of the base's config. Where it has others, they are numbered in the order of the alphabet, and that
    is said. ValueError for names of which the head has more or fewer.
    """
    count = num_labels(lora)
    if count == 1:
        raise UserError(f"the head of {lora.title} has one output, which is a regression; give --run RUN, its run")
    every = {row["label"] for row in read_test_rows(str(data), None, "train", ["label"], "--data")}
    labels = {label for label in every if str(label).strip()}  # a row without one is told by its number later
    if all(class_number(label) is not None for label in labels):
        return {"num_labels": count}
    names, known = sorted(map(str, labels)), class_names(model)
    if known is not None and set(names) <= set(known) and count in (None, len(known)):
        return {"labels": known}
    if count not in (None, len(names)):
        raise UserError(
            f"the rows of {data} name {len(names)} classes ({', '.join(names)}), but the head of {lora.title} has "
            f"{count}, so their numbers are unknown; write the numbers of the classes, 0 to {count - 1}, as label"
        )
    numbered = ", ".join(f"{name} = {number}" for number, name in enumerate(names))
    warnings.warn(
        f"the base does not say which class is which, so the rows' labels are numbered in the order of the alphabet "
        f"({numbered}); if the adapter was trained with others, write those numbers as label",
        stacklevel=2,
    )
    return {"labels": names}

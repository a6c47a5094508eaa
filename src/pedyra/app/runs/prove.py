"""`pedyra prove`: two models on disk, each loaded alone, on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from pedyra.app.models.base import load_model, load_tokenizer, positions, task_type
from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.runs.evaluate import check_training_rows
from pedyra.app.runs.fit import Source, recipe_of
from pedyra.app.runs.run_folder import RunFolder, run_of
from pedyra.app.runs.setup import Setup, ready_to_fit
from pedyra.app.tasks.task import load_task
from pedyra.errors import UserError
from pedyra.fitting.judge import Batch
from pedyra.fitting.prove import Margin, Measured, Proof, compare
from pedyra.lora.folder import check_finite, load_adapter, read_lora
from pedyra.lora.inspection import find_adapter, read_adapter_config
from pedyra.lora.loaded import check_layers
from pedyra.methods.method import Adaptation
from pedyra.trainer.fit import base_of
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.prove import BASE, check_margin, measured, taken
from pedyra.trainer.rows import training_rows
from pedyra.trainer.untouched import untouched


@dataclass(frozen=True)
class OtherBase:
    """How the base of B is loaded, where it is not as that of A."""

    name: str | None = None
    """A folder, or a name on the Hub."""
    quantization: str | None = None
    """As `model.quantization` of a recipe."""


@dataclass(frozen=True)
class _Side:
    """One of the two."""

    given: str
    adapter: Path | None
    """The folder of an adapter."""
    merged: Path | None
    """The folder of a whole model."""

    @classmethod
    def of(cls, given: str) -> _Side:
        """What was given on the command line. ValueError where it is none of what can be proved."""
        path = Path(given)
        if given == BASE:
            return cls(given, None, None)
        if not path.is_dir():
            raise UserError(
                f"{given} is no folder; give a run folder, an adapter's, a merged model's, or the word {BASE} for the "
                f"base model alone"
            )
        adapter = any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter"))
        if not adapter and (path / "config.json").is_file():
            return cls(given, None, path)
        return cls(given, find_adapter(path), None)

    def section(self, base: ModelSection, other: OtherBase) -> ModelSection:
        """The model to load, given the base of the rows' adapter."""
        change: dict[str, Any] = {}
        if self.merged is not None:
            if other.name is not None:
                raise UserError(f"{self.given} is a whole model and takes no base; leave out --base-b")
            change = {"name": str(self.merged), "revision": None, "quantization": "none"}
        if other.name is not None:
            change = {"name": other.name, "revision": None, "quantization": "none"}
        if other.quantization is not None:
            change["quantization"] = other.quantization
        return ModelSection(**{**base.model_dump(), **change})


def prove_paths(
    a: str, b: str, margin: Margin, source: Source, other: OtherBase, *, rows: int | None = None, shown: bool = False
) -> Proof:
    """Whether what `b` names is no worse than what `a` names, on the rows of `source` or of a run that one of them is.

    Args:
        other: the base of `b`.
        rows: at most so many; None: all.
        shown: progress bars.

    Raises:
        ValueError: no data, a folder that holds no model, adapters of different bases, a margin that this task lacks.
    """
    sides = [_Side.of(each) for each in (a, b)]
    check_margin(margin, sides[0].given == BASE)
    if other.name is None:
        _check_bases(sides)
    recipe, folder = _recipe(sides, source)
    models = [side.section(recipe.model, OtherBase() if number == 0 else other) for number, side in enumerate(sides)]
    proving = _Proving(recipe, source, folder, rows, shown)
    found = [proving.measure(side, model) for side, model in zip(sides, models, strict=True)]
    base = None
    if margin.of == "won":
        base = proving.measure(_Side(BASE, None, None), recipe.model, is_won_from=True)
    known = {"a": a, "b": b, "rows": proving.rows, "weights": proving.weights, "base": proving.base}
    return compare(found[0], found[1], margin, base, **known)


def _check_bases(sides: Sequence[_Side]) -> None:
    """Refuse adapters that name different bases, of which one would be loaded on the wrong one: ValueError."""
    configs = [read_adapter_config(side.adapter) for side in sides if side.adapter is not None]
    names = [config.get("base_model_name_or_path") for config in configs]
    if len(names) == 2 and all(names) and names[0] != names[1]:
        raise UserError(
            f"A is an adapter of the base {names[0]}, and B of {names[1]}; give --base-b {names[1]} if both bases have "
            f"the same tokenizer and answer the same rows"
        )


def _recipe(sides: Sequence[_Side], source: Source) -> tuple[Recipe, Path | None]:
    """Model and data: of the run, or of the first side whose folder tells it; and the run folder, if there is one."""
    loras = [
        (Path(side.given), side.adapter)
        for side in sides
        if side.adapter is not None and read_adapter_config(side.adapter)["peft_type"] == "LORA"
    ]
    loras.sort(key=lambda each: run_of(each[0]) is None)
    if loras:
        path, adapter = loras[0]
        return recipe_of(path, read_lora(adapter), source), source.folder(path)
    if source.run is None:
        raise UserError("neither A nor B is a LoRA that says its base model and its task; give --run RUN, which does")
    return recipe_of(source.run, read_lora(source.run), source), source.run


class _Proving:
    """One proof: the rows, which are the same for all models, and a model at a time."""

    def __init__(self, recipe: Recipe, source: Source, folder: Path | None, rows: int | None, shown: bool) -> None:
        self._recipe, self._most, self._shown, self._all = recipe, rows, shown, source.data is not None
        self._tokenizer = load_tokenizer(recipe.model)
        self._task = load_task(recipe.data, self._tokenizer, recipe.seed, positions(recipe.model))
        if source.data is None and folder is not None:
            check_training_rows(RunFolder(folder), recipe, self._task)
        self._batches: list[Batch] | None = None
        self.rows = 0
        self.weights: list[float] = []
        """Of each batch."""
        self.base = "the base model"
        """From what the won is counted, in words."""

    def measure(self, side: _Side, section: ModelSection, *, is_won_from: bool = False) -> Measured:
        """This model on the rows, after which it is gone.

        Args:
            is_won_from: what A won is counted from it, so that a head that is drawn at random is fitted to it first.
        """
        model = self._loaded(side, section)
        setup = Setup(
            recipe=self._recipe, tokenizer=self._tokenizer, task=self._task, adaptation=Adaptation(model=model)
        )
        with TemporaryDirectory() as scratch:
            trainer = setup.trainer(scratch, report_to="none")
            trainer.args.disable_tqdm = not self._shown
            ready_to_fit(self._recipe, trainer)
            data = None
            if self._all:  # nothing is calibrated, so both halves of a file of rows are for the proof
                data, trainer.train_dataset = {"first": self._task.train, "second": self._task.eval}, None
            with untouched(trainer, model):
                judge = TrainerJudge(trainer, model)
                if self._batches is None:
                    self._batches, self.rows = taken(judge, data, self._most)
                using = nullcontext
                if is_won_from and getattr(model.get_base_model(), "drawn_anew", ["tiny"]):
                    using, self.base = base_of(trainer, model, [] if self._all else training_rows(trainer), "default")
                with using():
                    found, self.weights = measured(judge, self._batches, side.given)
        del trainer, setup, judge, model, using
        gc.collect()  # a Trainer is in circles, and the next model needs the room
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def _loaded(self, side: _Side, section: ModelSection) -> Any:
        kind, recipe = self._recipe.data.kind, self._recipe
        base = load_model(section, kind, self._task.num_labels, self._tokenizer, recipe.seed)
        if side.adapter is None:
            # What asks a Trainer takes a model with an adapter, and no Trainer takes a quantised one without; B of this
            # one is zero, so that it adds nothing.
            empty = LoraConfig(r=1, target_modules="all-linear", task_type=task_type(kind))
            return get_peft_model(base, empty)
        model = load_adapter(base, side.adapter)
        if read_adapter_config(side.adapter)["peft_type"] == "LORA":
            lora = read_lora(side.adapter)
            check_finite(lora)
            check_layers(lora, model)
        return model

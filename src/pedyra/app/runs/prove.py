"""`pedyra prove`: two models on disk are loaded one after the other, and judged on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from pedyra.app.models.base import load_model, task_type
from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.runs.adapter_recipe import recipe_of
from pedyra.app.runs.evaluate import load_rows
from pedyra.app.runs.run_folder import run_of
from pedyra.app.runs.setup import judging, ready_to_fit
from pedyra.app.runs.source import Source
from pedyra.errors import UserError
from pedyra.fitting.fit import Rows
from pedyra.fitting.heldout import Comparison, answers_beside
from pedyra.fitting.judge import Batch
from pedyra.fitting.logits import Logits
from pedyra.fitting.modes import evaluating
from pedyra.fitting.prove import Margin, Measurement, Proof, compare
from pedyra.lora.folder import check_finite, check_layers, find_adapter, load_adapter, read_adapter_config, read_lora
from pedyra.trainer.fit import base_of
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.prove import BASE, adapters_beside, check_margin, heldout_rows, margin_of, measurement, progress_bar
from pedyra.trainer.rows import training_rows
from pedyra.trainer.untouched import untouched


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    name: str  # the folder, or the word base, as it stands on the command line
    path: Path | None = None  # None for the base
    adapter: Path | None = None  # the folder of its adapter; None for a whole model
    config: Mapping[str, Any] = field(default_factory=dict)  # the adapter's

    @classmethod
    def of(cls, name: str) -> _Side:
        path = Path(name)
        if name == BASE:
            return cls(name)
        if not path.is_dir():
            raise UserError(
                f"{name} is no folder; give a run folder, an adapter's, a merged model's, or the word {BASE} for the "
                f"base model alone"
            )
        has_adapter = any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter"))
        if not has_adapter and (path / "config.json").is_file():
            return cls(name, path)
        adapter = find_adapter(path)
        return cls(name, path, adapter, read_adapter_config(adapter))

    @property
    def is_lora(self) -> bool:
        return self.config.get("peft_type") == "LORA"

    @property
    def is_plain(self) -> bool:
        """Whether it is a LoRA that has no biases of the base's, so that another may lie beside it."""
        return self.is_lora and self.config.get("bias", "none") == "none"

    def section(self, base: ModelSection, other: Mapping[str, str]) -> ModelSection:
        """Say which model to load, given the base of the rows' adapter and keys that are not as there."""
        content = base.model_dump()
        if self.path is not None and self.adapter is None:
            if "name" in other:
                raise UserError(f"{self.name} is a whole model and takes no base; leave out --base-b")
            other = {"name": str(self.path), **other}
        if "name" in other:
            content |= {"revision": None, "quantization": "none"}
        return ModelSection(**{**content, **other})


def prove_paths(
    a: str,
    b: str,
    margin: Margin | None,
    source: Source,
    other: Mapping[str, str],
    *,
    rows: int | None = None,
    progress: bool = False,
) -> Proof:
    """Prove that what `b` names is no worse than what `a` names, on rows of `source` or of a run that one of them is.

    Where two adapters have the same base it is loaded once. Otherwise A stays in memory beside B, since no logits are
    kept.

    Args:
        margin: None: the default for what the rows have.
        other: keys of `model` in a recipe by which the base of `b` is another.
        rows: the most that are taken; None: all.
    """
    sides = (_Side.of(a), _Side.of(b))
    check_margin(margin, a == BASE)
    bases = [side.config.get("base_model_name_or_path") for side in sides]
    if "name" not in other and all(bases) and bases[0] != bases[1]:
        raise UserError(
            f"A is an adapter of the base {bases[0]}, and B of {bases[1]}; give --base-b {bases[1]} if both bases have "
            f"the same tokenizer and answer the same rows"
        )
    recipe, folder = _recipe(sides, source)
    models = [side.section(recipe.model, keys) for side, keys in zip(sides, ({}, other), strict=True)]
    proving = _Proving(recipe, source, folder, rows, progress)
    measures: dict[str, Measurement] = {}
    with ExitStack() as stack:
        in_a = proving.load(stack, sides[0], models[0])
        heldout = proving.heldout_rows(in_a)
        if not heldout.unlabelled:
            measures["a"] = proving.measure(in_a, a)
        margin = margin_of(margin, heldout, measures.get("a"))
        check_margin(margin, a == BASE)
        shares = models[0] == models[1] and sides[0].is_plain and (sides[1].is_plain or b == BASE)
        in_b = in_a.beside(stack, sides[1]) if shares else proving.load(stack, sides[1], models[1])
        if not heldout.unlabelled:
            measures["b"] = proving.measure(in_b, b)
        answers = Comparison()
        if in_a.answer(heldout.heldout[0]) is not None:
            with_bar = progress_bar(in_b.judge, "answers", heldout.heldout)
            answers = answers_beside(in_a.answer, in_b.answer, with_bar(heldout.heldout), in_a.judge.writes)
        del in_a, in_b
    details = {"a": a, "b": b, "rows": heldout.counts[1], "weights": proving.weights, "answers": answers}
    if margin.of == "gain":
        with ExitStack() as stack:
            in_base = proving.load(stack, _Side(BASE), recipe.model, is_reference=True)
            measures["base"] = proving.measure(in_base, BASE)
            del in_base
        details["base"] = proving.base
    none = Measurement()
    return compare(measures.get("a", none), measures.get("b", none), margin, measures.get("base"), **details)


def _recipe(sides: Sequence[_Side], source: Source) -> tuple[Recipe, Path | None]:
    """Find model and data of the run, or of the first side whose folder tells it, and the run folder, if any."""
    paths = sorted((side.path for side in sides if side.path and side.is_lora), key=lambda path: run_of(path) is None)
    path = paths[0] if paths else source.run
    if path is None:
        raise UserError("neither A nor B is a LoRA that says its base model and its task; give --run RUN, which does")
    return recipe_of(path, read_lora(path), source), source.folder(path)


@dataclass(frozen=True)
class _Model:
    """A model is in memory, with a Trainer that judges it."""

    judge: TrainerJudge
    using: Callable[[], Any] = nullcontext  # under it the right one of two adapters is active

    def answer(self, batch: Batch) -> Logits | None:
        with self.using(), evaluating(self.judge.model), torch.no_grad():
            return self.judge.answers(batch)

    def beside(self, stack: ExitStack, side: _Side) -> _Model:
        """Load the adapter of this side beside the one that is there, on the same base."""
        _, using = stack.enter_context(adapters_beside(self.judge.model, ("default", side.name)))
        return _Model(self.judge, using)


class _Proving:
    """Opens and measures models, all on the same rows."""

    def __init__(self, recipe: Recipe, source: Source, folder: Path | None, rows: int | None, progress: bool) -> None:
        self._recipe, self._most, self._progress, self._all = recipe, rows, progress, source.data is not None
        self._tokenizer, self._task = load_rows(recipe, None if self._all else folder)
        self._batches: Sequence[Batch] = ()
        self.weights: list[float] = []  # of the batches
        self.base = "the base model"  # from which a gain is counted

    def load(self, stack: ExitStack, side: _Side, section: ModelSection, *, is_reference: bool = False) -> _Model:
        """Load this model and a Trainer for it, until the stack is closed. Where A's gain is counted from it, a head
        that is drawn at random is fitted to it first."""
        stack.callback(_make_room)
        recipe, tokenizer, task = self._recipe, self._tokenizer, self._task
        base = load_model(section, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
        if side.adapter is None:
            # What asks a Trainer takes a model with an adapter, and no Trainer takes a quantised one without; B of this
            # one is zero, so that it adds nothing.
            empty = LoraConfig(r=1, target_modules="all-linear", task_type=task_type(recipe.data.kind))
            model: Any = get_peft_model(base, empty)
        else:
            model = load_adapter(base, side.adapter)
            if side.is_lora:
                lora = read_lora(side.adapter)
                check_finite(lora)
                check_layers(lora, model)
        trainer = stack.enter_context(judging(recipe, tokenizer, task, model, progress=self._progress))
        ready_to_fit(self._recipe, trainer)
        if self._all:  # nothing is calibrated, so both halves of a file of rows are for the proof
            trainer.train_dataset = None
        stack.enter_context(untouched(trainer, model))
        using = nullcontext
        if is_reference and getattr(model.get_base_model(), "random_weights", ["tiny"]):
            using, self.base = base_of(trainer, model, [] if self._all else training_rows(trainer), "default")
        return _Model(TrainerJudge(trainer, model), using)

    def heldout_rows(self, model: _Model) -> Rows:
        """Take the held-out rows; a model that writes goes on from prompts."""
        data = {"first": self._task.train, "second": self._task.eval} if self._all else None
        with model.using():
            rows = heldout_rows(model.judge, data, self._most)
        self._batches = rows.heldout
        return rows

    def measure(self, model: _Model, name: str) -> Measurement:
        with model.using():
            result, self.weights = measurement(model.judge, self._batches, name)
        return result


def _make_room() -> None:
    """Free what a model took: a Trainer is in circles, and the next model needs the room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""`pedyra fit`: an adapter on disk, and rows, become the smaller adapter on disk with its proof."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import Trainer

from pedyra.app.models.base import load_model
from pedyra.app.runs.adapter_recipe import recipe_of
from pedyra.app.runs.evaluate import load_rows
from pedyra.app.runs.served import served_lines, served_together
from pedyra.app.runs.setup import judging, ready_to_fit
from pedyra.app.runs.source import Source
from pedyra.errors import UserError
from pedyra.export.destinations import Destination, base_name
from pedyra.fitting.cut import FIT_RECORD, check_out
from pedyra.fitting.request import FitRequest
from pedyra.fitting.result import Fit, answer
from pedyra.lora.folder import SavedLora, check_finite, check_layers, find_adapter, load_adapter, read_lora
from pedyra.trainer.fit import check_asked, fit_trainer


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of `pedyra fit`, for one adapter, or for several alike."""

    request: FitRequest = FitRequest()
    others: Sequence[FitRequest] = ()  # the same calibration answers these too, of which no adapter is written
    source: Source = Source()
    place: Destination | None = None  # which will serve it
    overwrite: bool = False
    began: float | None = None  # the time of `time.perf_counter` from which it is told how long the command took
    progress: bool = False


Report = Callable[[str], None]  # prints a line; a result is printed before it is written


def fit_folders(outs: Mapping[Path, Path], options: FitOptions, report: Report) -> list[Fit]:
    """Fit each adapter -> the folder for the smaller one; then tell the lines by which one server has them all."""
    bases = dict.fromkeys(base_name(read_lora(path)) for path in outs)
    if len(bases) > 1:
        raise UserError(f"one server has one base, and these adapters are of {' and of '.join(bases)}; fit them apart")
    for out in outs.values():
        check_out(out, options.overwrite)
    fits, folders = [], {}
    for path, out in outs.items():
        if len(outs) > 1:
            report(f"\n{path}")
        fits += fit_folder(path, out, options, report)
        folders[path.name if path.name not in folders else f"{path.name}-{len(folders)}"] = out
        report(f"adapter     {out}")
        options = replace(options, began=None)
    if options.place is not None and len(outs) > 1:
        for line in ("", f"all {len(outs)} on one server", *served_together(options.place, folders)):
            report(line)
    return fits


def fit_folder(path: Path, out: Path, options: FitOptions, report: Report = lambda line: None) -> list[Fit]:
    """Fit the adapter in `path` (a run folder, or a PEFT folder) on rows, and write the smaller one to `out`. It comes
    first, and then the result for each other tolerance that has an answer."""
    began = options.began or time.perf_counter()
    check_out(out, options.overwrite)
    check_asked(options.request, options.place)
    if options.request.rank is None:
        _refuse_second_fit(path)
    with adapter_trainer(path, options.source, progress=options.progress) as (trainer, lora):
        result = fit_trainer(trainer, options.request, place=options.place)
        result = replace(result, seconds=time.perf_counter() - began)
        report(str(result))
        result.write(lora, out)
        for line in () if options.place is None else served_lines(result, lora, options.place, out):
            report(line)
        return [result, *_for_others(result, options.others, report)]


def _for_others(result: Fit, others: Sequence[FitRequest], report: Report) -> Iterator[Fit]:
    """Find the size for each other tolerance, and tell it in two lines, or why these rows give none."""
    for request in others:
        name = f"{f'at {request}':12}"
        try:
            other = result.at(request.tolerance, changed=request.changed)
        except UserError as error:
            report(f"{name}{error}")
        else:
            report(f"{name}{other.promise}")
            report(answer(other))
            yield other


def _refuse_second_fit(path: Path) -> None:
    """Refuse what a fit has made smaller already, where the whole adapter is there too: the tolerance of a second fit
    would be added to that of the first. Where it is gone, that is a warning."""
    folder = find_adapter(path)
    if not (folder / FIT_RECORD).is_file():
        return
    message = f"{path} was made smaller by a fit already, and another one adds its tolerance to that"
    whole = folder.resolve().parent
    if any((place / "adapter_config.json").is_file() for place in (whole, whole / "adapter")):
        raise UserError(f"{message}; fit the whole adapter, {whole}, or give --rank")
    warnings.warn(f"{message}; fit the whole adapter if you have it", stacklevel=3)


@contextmanager
def adapter_trainer(path: Path, source: Source, *, progress: bool = False) -> Iterator[tuple[Trainer, SavedLora]]:
    """Give the adapter in `path`, and a Trainer that has it with its base and its rows."""
    lora = read_lora(path)
    lora.check_supported("fit")
    check_finite(lora)
    recipe = recipe_of(path, lora, source)
    tokenizer, task = load_rows(recipe, source.folder(path) if source.data is None else None)
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    model = load_adapter(base, lora.folder)
    check_layers(lora, model)
    with judging(recipe, tokenizer, task, model, progress=progress) as trainer:
        ready_to_fit(recipe, trainer)
        yield trainer, lora

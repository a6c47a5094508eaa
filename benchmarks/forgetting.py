"""`python -m benchmarks.forgetting RUN --general ROWS`: a fit against forgetting, beside two simpler ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from peft.tuners.lora.intruders import reduce_intruder_dimension

from benchmarks.command import JsonFile, Runs, Threads, command_line, print_done
from benchmarks.rows import Row, RowFile
from benchmarks.trained import BATCH, TrainedLora, opened
from pedyra.app.tasks.sources import read_test_rows
from pedyra.errors import UserError
from pedyra.fitting.cut import cut_to
from pedyra.fitting.fit import GeneralRows, Rows, fit_batches
from pedyra.fitting.general import scaled, text_batches, texts_of
from pedyra.fitting.judge import Batch, Cut
from pedyra.fitting.modes import disabled, evaluating
from pedyra.fitting.paired import paired
from pedyra.fitting.wanted import Wanted

FORGETTING_KEY = ("run", "general", "rows", "way", "asked")
SCALES = (0.9, 0.8, 0.7)
MITIGATIONS = (0.75, 0.5, 0.25)
"""`mitigation_lambda` of PEFT's `reduce_intruder_dimension`, whose default is 0.75."""
GENERAL_ROWS = 192


def forgetting(
    runs: Runs,
    general: Annotated[Path, typer.Option(metavar="ROWS", help="Text that should not be forgotten, in a column text.")],
    rows: Annotated[int, typer.Option(min=16, help="Of training, to calibrate with.")] = 512,
    tolerance: Annotated[str, typer.Option(metavar="PART", help="That of the fit.")] = "2%",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fit trained LoRAs so that they forget less, and scale them down; the loss of the task and of general text."""
    file = RowFile(json_file, FORGETTING_KEY)
    texts = read_test_rows(str(general), None, "train", ["text"], "--general")
    made = ({"general": str(general), **row} for row in bench_forgetting(runs, texts, rows, tolerance))
    print_done(file.keep(made), ["run", "way", "amount", "loss", "general_loss"])


def bench_forgetting(
    runs: Sequence[Path], general: Sequence[Any], rows: int = 512, tolerance: str = "2%"
) -> Iterator[dict[str, Any]]:
    """Yield a row for each run and way to forget less: the loss of the task, and that of general text.

    Ways: `base` and `whole`; `scaled`, the whole adapter times `asked`; `intruders`, PEFT's
    `reduce_intruder_dimension` that keeps this part of them; and `fit`, whatever `pedyra fit --general` takes at this
    tolerance, from its calibration to its proof. `amount` is the part of the parameters that is left, or the factor.

    Args:
        general: texts, or rows with the column `text`; half of them say what harms them, and half are measured on.
        rows: of training, to calibrate with, at most.
    """
    texts = texts_of(general)[:GENERAL_ROWS]
    if len(texts) < 4 * BATCH:
        raise UserError(f"general has {len(texts)} texts, and it takes at least {4 * BATCH}; give more")
    for run in runs:  # what is wrong with one is told before anything is measured
        recipe, _, tokenizer, _ = opened(run)
        if recipe.data.kind != "causal_lm":
            raise UserError(
                f"{run} is of data.kind {recipe.data.kind}, and general text is for a model that writes; give runs of "
                f"causal_lm"
            )
        text_batches(tokenizer, texts, BATCH)
    for run in runs:
        trained = TrainedLora(run, rows)
        batches = text_batches(trained.tokenizer, texts, BATCH)
        for row in _forgetting(trained, batches[::2], batches[1::2], tolerance):
            yield {"run": str(run), "rows": rows, **row}


def _forgetting(trained: TrainedLora, slopes: Sequence[Batch], held: Sequence[Batch], tolerance: str) -> Iterator[Row]:
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
    for left in MITIGATIONS:
        reduce_intruder_dimension(
            trained.model, new_adapter_name=INTRUDERS, mitigation_lambda=left, logging_sink=lambda _: None
        )
        trained.model.set_adapter("default")
        yield row("intruders", left, partial(_other, trained.model), 1.0)
        trained.model.delete_adapter(INTRUDERS)
    general = GeneralRows(judge=trained.judge, slopes=slopes, proof=held)
    parts = Rows(calibration=trained.training, held=trained.batches, general=general)
    wanted = Wanted(tolerance=tolerance)
    found = fit_batches(trained.judge, parts, wanted)
    yield row("fit", wanted.part, partial(cut_to, trained.model, found.factors), found.chosen.share)


INTRUDERS = "without_intruders"


@contextmanager
def _other(model: Any) -> Iterator[None]:
    """While it lasts, the model has the adapter without intruders, in evaluation mode."""
    model.set_adapter(INTRUDERS)
    try:
        with evaluating(model):
            yield
    finally:
        model.set_adapter("default")


@contextmanager
def _scaled(trained: TrainedLora, scale: float) -> Iterator[None]:
    """While it lasts, each layer adds this part of what the adapter gives."""
    with evaluating(trained.model), scaled(trained.model, scale):
        yield


if __name__ == "__main__":
    command_line(forgetting)

"""`python -m benchmarks.answers RUN ROWS.jsonl`: what does a fit without labels promise, and what is true of it?

ROWS has labelled rows that the run was neither trained on nor judged by. Each fit draws its own from the first part of
them, and sees no label where it is asked for changed answers. The others are the truth, the same for all fits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import JsonFile, Threads, command_line, print_done, several
from benchmarks.rows import Row, RowFile
from pedyra.app.runs.fit import adapter_trainer
from pedyra.app.runs.source import Source
from pedyra.errors import UserError
from pedyra.fitting.cut import cut_to
from pedyra.fitting.modes import evaluating
from pedyra.fitting.result import Fit
from pedyra.lora.files import read_rows
from pedyra.trainer.fit import fit

ANSWERS_KEY = ("run", "asked", "rows", "fit", "truth")
SHARES = ("5%", "2%", "1%")
"""A fit without labels is asked for these shares of changed answers, from one calibration."""
LOSSES = ("1pt", "1%")
"""A fit with labels is asked for these tolerances, from one calibration."""


def answers(
    run: Annotated[Path, typer.Argument(help="A finished run of a LoRA classifier.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="Labelled rows that it has not seen (.jsonl).", show_default=False)],
    rows: Annotated[list[int] | None, several("--rows", "1000", "Rows that a fit is given", min=64)] = None,
    fits: Annotated[int, typer.Option(min=1, help="Fits of each number of rows, each of its own rows.")] = 1,
    truth: Annotated[int, typer.Option(min=64, help="Other rows, that say what is true.")] = 1000,
    labelled: Annotated[bool, typer.Option(help="Ask with labels too: points, and a part of the gain.")] = True,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fit a classifier's adapter without labels, and count on other rows how many answers and points it truly costs."""
    made = bench_answers(run, read_rows(file), rows or [1000], fits, truth, labelled)
    print_done(
        RowFile(json_file, ANSWERS_KEY).keep(made),
        ["asked", "rows", "fit", "rank", "of", "bound", "true_changed", "true_fall", "beyond", "seconds"],
    )


def bench_answers(
    run: Path, every: Sequence[Row], counts: Sequence[int], fits: int, truth: int, labelled: bool
) -> Iterator[Row]:
    """Yield a row for each fit and each thing that it was asked for.

    `true_changed` is the share of other answers on the rows of the truth, `true_fall` by how much the accuracy is lower
    there; `beyond` says whether the former is above what was asked.

    Raises:
        UserError: too few rows.
    """
    if len(every) < truth + max(counts):
        raise UserError(f"there are {len(every)} rows, and {truth} of the truth and {max(counts)} for a fit are asked")
    order = random.Random(0).sample(range(len(every)), len(every))
    others, pool = [every[place] for place in order[:truth]], [every[place] for place in order[truth:]]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        known = _Truth(stack, run, _source(scratch / "truth.jsonl", others))
        for count in counts:
            for number in range(fits):
                drawn = random.Random(1 + number).sample(pool, count)
                bare = [{key: row[key] for key in row if key not in ("label", "labels")} for row in drawn]
                for results in (
                    _fits(run, _source(scratch / "bare.jsonl", bare), "changed", SHARES),
                    _fits(run, _source(scratch / "rows.jsonl", drawn), "tolerance", LOSSES) if labelled else (),
                ):
                    for asked, result in results:
                        case = {"run": str(run), "asked": asked, "rows": count, "fit": number, "truth": truth}
                        yield {**case, **known.judged(result)}


def _fits(run: Path, source: Source, kind: str, amounts: Sequence[str]) -> Iterator[tuple[str, Fit]]:
    """Yield what was asked, and the fit: one calibration answers all."""
    with adapter_trainer(run, source) as (trainer, _):
        asks: list[dict[str, Any]] = [{kind: amount} for amount in amounts]
        first = fit(trainer, **asks[0])
        yield f"{kind} {amounts[0]}", first
        for amount, ask in zip(amounts[1:], asks[1:], strict=True):
            yield f"{kind} {amount}", first.at(**ask)


class _Truth:
    """Rows that no fit has seen, with what the whole adapter answers."""

    def __init__(self, stack: ExitStack, run: Path, source: Source) -> None:
        self._trainer, _ = stack.enter_context(adapter_trainer(run, source))
        self._model: Any = self._trainer.model
        self.whole, self._right = self._answers(partial(evaluating, self._model))

    def _answers(self, cut: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the class of each row with the model that `cut` makes, and the right one."""
        halves: Any = (self._trainer.train_dataset, self._trainer.eval_dataset)  # the rows of a folder come so
        with cut():
            made = [self._trainer.predict(half) for half in halves]
        classes = [np.asarray(each.predictions).argmax(-1) for each in made]
        return np.concatenate(classes), np.concatenate([np.asarray(each.label_ids) for each in made])

    def judged(self, result: Fit) -> Row:
        smaller = self.whole
        if not result.is_whole:
            smaller, _ = self._answers(partial(cut_to, self._model, result.factors))
        changed, proof = float((smaller != self.whole).mean()), result.chosen.proof
        limit = result.tolerance.value if result.tolerance.of == "answers" else None
        share = proof.changed if proof else None
        accuracy = float((self.whole == self._right).mean())
        return {
            "rank": result.chosen.rank, "of": result.whole.rank, "share": result.chosen.share,
            "way": result.chosen.way, "verdict": result.verdict,
            "measured": share and share.mean, "bound": share and share.upper(),
            "accuracy": accuracy, "true_changed": changed,
            "true_fall": accuracy - float((smaller == self._right).mean()),
            "beyond": None if limit is None else changed > limit, "seconds": round(result.seconds, 1),
        }  # fmt: skip


def _source(path: Path, rows: Sequence[Row]) -> Source:
    """Write the rows as a user has them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(data=path)


if __name__ == "__main__":
    command_line(answers)

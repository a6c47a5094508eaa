"""`pedyra.prove(trainer, a, b)`: is adapter B no worse than A, by the loss that this Trainer trains?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Trainer

from pedyra.errors import UserError
from pedyra.fitting.fit import Rows, check_labels, labelled
from pedyra.fitting.heldout import HeldOut, answers_beside
from pedyra.fitting.judge import Batch
from pedyra.fitting.modes import disabled, evaluating
from pedyra.fitting.prove import Margin, Measurement, Proof, compare
from pedyra.fitting.search import LEAST
from pedyra.lora.folder import MISFITS, active_adapter, check_finite, check_layers, read_lora
from pedyra.trainer.fit import base_of, check_live, check_whole
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.rows import proof_rows, training_rows
from pedyra.trainer.untouched import untouched

BASE = "base"
"""The user names the base model alone by this word."""


def prove(
    trainer: Trainer,
    a: str | Path,
    b: str | Path,
    *,
    margin: str | None = None,
    changed: str | None = None,
    data: Any = None,
    rows: int | None = None,
) -> Proof:
    """Prove that B is no worse than A, by a margin: both answer the same held-out rows of this Trainer in turn.

    Nothing of Trainer, model or random state changes: a folder is loaded beside the live adapter, and taken out again.

    Args:
        a: an adapter's folder, the name of a live adapter, or "base", the base model alone.
        b: another one.
        margin: how much worse B may be: "1%" of what A won over the base, "0.5pt", points of the accuracy, or
            "0.01 loss", a number of it. By default "1pt" for a classifier, and "1%" for others.
        changed: or which share of B's answers may be others than A's, "2%": it needs no labels, for which it is the
            default.
        data: held-out rows, as the Trainer takes an eval_dataset; by default its own.
        rows: how many of them at most; by default all.

    Returns:
        The proof: print it. Its `verdict` is "no worse", "worse" or "cannot tell".

    Raises:
        ValueError: no LoRA, an adapter of another base, a sharded model, too few rows, a margin that is none.
    """
    if not isinstance(trainer, Trainer):
        raise UserError(f"prove takes the Trainer that has trained the model, and {type(trainer).__name__} is none")
    limit = Margin.of_request(margin, changed)
    check_margin(limit, str(a) == BASE)
    check_whole(trainer, "a proof")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    check_live(model, active_adapter(model))
    # To load an adapter has put the model into PEFT's own evaluation mode.
    with untouched(trainer, model), adapters_beside(model, (a, b)) as (in_a, in_b), evaluating(model):
        judge = TrainerJudge(trainer, model)
        with in_a():  # it goes on from prompts without an answer
            heldout = heldout_rows(judge, data, rows)
        measurements: dict[str, Measurement] = {}
        facts: dict[str, Any] = {"weights": (), "a": str(a), "b": str(b), "rows": heldout.counts[1]}
        for name, using in ({} if heldout.unlabelled else {"A": in_a, "B": in_b}).items():
            with using():
                measurements[name], facts["weights"] = measurement(judge, heldout.heldout, name)
        limit = margin_of(limit, heldout, measurements.get("A"))
        if limit.of == "gain":
            using, facts["base"] = base_of(trainer, model, training_rows(trainer), active_adapter(model))
            with using():
                measurements["base"], _ = measurement(judge, heldout.heldout, "base")
        batches = progress_bar(judge, "answers", heldout.heldout)(heldout.heldout)
        facts["answers"] = answers_beside(judge.answering(in_a), judge.answering(in_b), batches, judge.writes)
    none = Measurement()
    return compare(measurements.get("A", none), measurements.get("B", none), limit, measurements.get("base"), **facts)


def margin_of(limit: Margin | None, rows: Rows, a: Measurement | None) -> Margin:
    """Return the margin of the request, or the default for these rows. ValueError: it needs labels that they lack."""
    if limit is None:
        return Margin.default(labelled=not rows.unlabelled, accuracy=a is not None and a.correct is not None)
    check_labels(rows, "margin", None if limit.of == "answers" else limit.text)
    return limit


def check_margin(margin: Margin | None, is_base: bool) -> None:
    """Raise ValueError for a margin in parts of what A gained over the base, where A is the base."""
    if margin is not None and margin.of == "gain" and is_base:
        raise UserError(
            f"margin is {margin.text} of what A won over the base, and A is the base; give a number of the loss "
            f"('0.01 loss'), points of the accuracy (0.5pt), or a share of the answers (changed 2%)"
        )


def heldout_rows(judge: TrainerJudge, data: Any, most: int | None) -> Rows:
    """Return the held-out rows, without the batches that have no labels where others have. ValueError for too few."""
    rows = proof_rows(judge.trainer, data, most)
    batches = labelled(judge, rows.heldout)
    if len(batches) < LEAST:
        raise UserError(
            f"{len(batches)} of {len(rows.heldout)} batches have a label, and a proof takes {LEAST}; give labels"
        )
    return replace(rows, heldout=batches)


def measurement(judge: TrainerJudge, batches: Sequence[Batch], name: str) -> tuple[Measurement, list[float]]:
    """Measure the judge's model, as it is, on these batches; and say how much each of them weighs."""
    heldout = HeldOut(judge, batches, progress_bar(judge, name, batches))
    return Measurement(heldout.whole, heldout.metrics, heldout.correct), heldout.weights


def progress_bar(judge: TrainerJudge, name: str, batches: Sequence[Batch]) -> Callable[..., Any]:
    """Return what passes batches on under a bar of this name, where the Trainer shows bars."""
    has_bar = not judge.trainer.args.disable_tqdm and judge.trainer.is_world_process_zero()
    return partial(tqdm, total=len(batches), desc=name, disable=not has_bar)


@contextmanager
def adapters_beside(model: PeftModel, adapters: Sequence[str | Path]) -> Iterator[list[Callable[[], Any]]]:
    """Yield context managers under which the live model has one of these; folders are loaded, and taken out again."""
    active, added, using = model.active_adapters[0], [], []

    @contextmanager
    def adapter(name: str) -> Iterator[None]:
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(active)

    try:
        for number, each in enumerate(adapters):
            name = str(each)
            if name == BASE:
                using.append(partial(disabled, model))
                continue
            if name not in model.peft_config:
                name = f"pedyra_prove_{number}"
                added.append(name)
                _add_adapter(model, Path(each), name)
            using.append(partial(adapter, name))
        model.set_adapter(active)
        yield using
    finally:
        model.set_adapter(active)
        for name in added:
            if name in model.peft_config:
                model.delete_adapter(name)


def _add_adapter(model: PeftModel, path: Path, name: str) -> None:
    """Load the LoRA in `path` beside the live ones. Raises ValueError: it does not fit, or is of another base."""
    lora = read_lora(path)
    check_finite(lora)
    live: Any = next(iter(model.peft_config.values()))
    bases = [lora.config.get("base_model_name_or_path"), live.base_model_name_or_path]
    if all(bases) and bases[0] != bases[1]:
        raise UserError(f"{path} is an adapter of the base {bases[0]}, and the live model is {bases[1]}")
    if lora.config.get("bias", "none") != "none" or live.bias != "none":
        raise UserError(f"{path} cannot be loaded beside another adapter, since one of them has biases of the base's")
    try:
        model.load_adapter(str(lora.folder), adapter_name=name)
    except MISFITS as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit the live model: {message}") from error
    check_layers(lora, model, name)

"""The result of a fit: sizes, verdict and proof, as text and as a model card, and the smaller adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode
from tempfile import TemporaryDirectory
from typing import Any
from weakref import ref

from accelerate import PartialState

from pedyra.export.destinations import Destination, destination
from pedyra.export.readers import export_lora
from pedyra.fitting.cut import CURVE, FIT_RECORD, Factors, check_out, cut_live, write_cut
from pedyra.fitting.heldout import Metrics
from pedyra.fitting.sizes import Candidate
from pedyra.fitting.verdict import FLAT, Tolerance
from pedyra.lora.card import CARD, adapter_card, shown_megabytes, shown_name, shown_ranks
from pedyra.lora.files import json_line, write_folder
from pedyra.lora.folder import SavedLora, read_lora, saved_lora


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The result of a fit. `print` shows it, `save` writes the smaller adapter, `apply` puts it into the live model.

    Increases are of the mean loss (`measure`), against the adapter as it was; positive is worse.
    """

    whole: Candidate
    curve: list[Candidate]
    """The sizes in the order in which they were measured, the whole adapter first."""
    chosen: Candidate
    """The whole adapter, where none smaller is within tolerance."""
    tolerance: Tolerance
    by_rank: bool
    """Whether the user named the rank, which is taken whatever it does to the loss."""
    why: str = ""
    """Why the tolerance is the default; empty where the user has given it."""
    factors: Factors = field(repr=False)
    """Layer -> A and B of the chosen size."""
    verdict: str
    """One of flat, capacity-limited and unknown."""
    words: str
    """The verdict as a sentence."""
    measure: str = "loss"
    """The loss, or the name of a divergence where the loss says nothing about held-out rows."""
    rows: str = ""
    """The rows on which the fit measured, in words."""
    base: str = "the base model"
    """The model from which the gain is counted."""
    seconds: float = 0.0
    steps: float = 0.0
    """The time of the fit in training steps, each a batch of the calibration."""
    metrics: Mapping[str, Metrics] = field(default_factory=dict)
    """base, whole and, if any, smaller -> metric -> value, on the held-out rows; empty where the task has none."""
    model: Any = field(repr=False, default=None)
    adapter: str = "default"
    trainer: ref[Any] | None = field(repr=False, default=None)
    place: Destination | None = field(repr=False, default=None)
    """Where the adapter will be served, and whose form is written."""
    again: Callable[..., Fit] = field(repr=False, compare=False)
    """What `at` calls."""

    def at(self, tolerance: Any = None, *, changed: Any = None) -> Fit:
        """Find the size for another tolerance, by the same calibration and the same held-out rows. Sizes that were
        measured are not measured again.

        Args: as of `pedyra.fit`.

        Raises:
            UserError: the live adapter has changed since (it was applied, or trained on); points without an accuracy.
        """
        return self.again(tolerance=tolerance, changed=changed)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> directions kept; a layer that keeps 0 has one row of zeros, since PEFT knows no rank 0."""
        return self.chosen.ranks

    @property
    def is_whole(self) -> bool:
        """True where no smaller size is taken."""
        return self.ranks == self.whole.ranks

    def megabytes(self, size: Candidate) -> float:
        """Return what the factors of this size take on disk."""
        return size.parameters * next(iter(self.factors.values()))[0].element_size() / 1e6

    @property
    def decides(self) -> str:
        """Name what is compared with the tolerance: the answers, the accuracy, or the measure."""
        return self.measure if self.tolerance.of == "gain" else self.tolerance.of

    @property
    def promise(self) -> str:
        """Say in a sentence what holds of a size that is accepted."""
        limit = self.tolerance
        promises = {
            "answers": f"at most {limit} of the answers are others than the whole adapter's",
            "accuracy": f"the accuracy is at most {limit} below the whole adapter's",
            "gain": f"the {self.measure} rises by at most {limit} of what fine-tuning won",
        }
        return f"with 95 % confidence {promises[limit.of]}"

    def row(self) -> dict[str, Any]:
        """Return the result as one row of plain values."""
        chosen, proof = self.chosen, self.chosen.proof
        rise = proof and proof.rise
        row = {
            "kept": sum(self.ranks.values()),
            "of": sum(self.whole.ranks.values()),
            "rank": chosen.rank,
            "of_rank": self.whole.rank,
            "way": chosen.way,
            "parameters": chosen.parameters,
            "share": chosen.share,
            "megabytes": self.megabytes(chosen),
            "of_megabytes": self.megabytes(self.whole),
            "predicted_increase": chosen.predicted,
            "measured_increase": rise and rise.mean,
            "standard_error": rise and rise.error,
            "interval": rise and list(rise.interval()),
            "batches": rise and rise.batches,
            "tolerance": self.tolerance.limit,
            "won": self.tolerance.gain and self.tolerance.gain.mean,
            "base": self.base,
            "verdict": self.verdict,
            "measure": self.decides,
            "promise": self.promise,
        }
        row |= proof.row() if proof else {}
        if self.metrics:
            row["metrics"] = {key: dict(values) for key, values in self.metrics.items()}
        if proof and proof.pairs:
            row |= {"accuracy_change": -proof.pairs.mean, "accuracy_interval": [*proof.pairs.change()]}
        return {**row, "ranks": self.ranks}

    def curve_rows(self) -> list[dict[str, Any]]:
        """Return a row for each size that was measured, on as many batches as it took to tell."""
        return [
            {
                "rank": each.rank,
                "kept": sum(each.ranks.values()),
                "parameters": each.parameters,
                "share": each.share,
                "predicted_increase": each.predicted,
                "measured_increase": each.proof and each.proof.rise and each.proof.rise.mean,
                "standard_error": each.proof and each.proof.rise and each.proof.rise.error,
                "batches": each.proof and each.proof.batches,
                "accepted": each.accepted,
                "beyond": self.beyond(each),
                "tolerance": self.tolerance.limit,
                "chosen": each.ranks == self.ranks,
                **self._decided(each),
            }
            for each in self.curve
        ]

    def beyond(self, size: Candidate) -> bool:
        """Tell whether the size is clearly beyond the tolerance."""
        return size.proof is not None and self.tolerance.learned and self.tolerance.forbids(size.proof)

    def _decided(self, size: Candidate) -> dict[str, Any]:
        """Return what is compared with the tolerance, with its bounds of 95 % to each side."""
        if size.proof is None:
            return {"value": None, "lower": None, "upper": None}
        estimate = self.tolerance.estimate(size.proof)
        return {"value": estimate.mean, "lower": estimate.lower(), "upper": estimate.upper()}

    def __str__(self) -> str:
        return report(self)

    def save(self, out: str | Path, overwrite: bool = False, *, for_: str | None = None) -> Path:
        """Write the smaller adapter as an ordinary PEFT folder, with its record and the rows of its curve beside it.

        What is no factor of the adapter (heads, biases, magnitudes) is saved as the live model has it now, and the
        Trainer's tokenizer (`processing_class`) beside it.

        Args:
            overwrite: replace an earlier fit in `out`.
            for_: where it will be served, as of `pedyra.fit`, and in the form that this place reads; by default the
                place that the fit was for, else PEFT.

        Raises:
            ValueError: `out` holds files, or is a link; the place is unknown, or does not take this adapter or its
                rank.
        """
        out, place = Path(out), None if for_ is None else destination(for_)
        if PartialState().is_main_process:
            check_out(out, overwrite)
            with saved_lora(self.model, self.adapter) as lora:
                trainer = None if self.trainer is None else self.trainer()
                if (processing := getattr(trainer, "processing_class", None)) is not None:  # as Trainer.save_model does
                    processing.save_pretrained(lora.folder)
                self.write(lora, out, place)
        PartialState().wait_for_everyone()
        return out

    def write(self, lora: SavedLora, out: Path, place: Destination | None = None) -> None:
        """Write the smaller adapter, its record and its curve, as this place reads it, or the one of the fit; what is
        no factor of it comes from the folder `lora`."""
        if (place := place or self.place) is None:
            self._write_plain(lora, out)
            return
        with TemporaryDirectory() as scratch:
            plain = formed = Path(scratch, "plain")
            self._write_plain(lora, plain)
            smaller = read_lora(plain, lora.title)
            place.check(smaller, max(layer.rank for layer in smaller.layers))
            if place.form != "peft":
                formed = export_lora(plain, place.form, Path(scratch, "formed"))
                for name in (FIT_RECORD, CURVE, CARD):
                    shutil.copy2(plain / name, formed / name)
            write_folder(out, lambda part: shutil.copytree(formed, part, dirs_exist_ok=True))

    def _write_plain(self, lora: SavedLora, out: Path) -> None:
        card = fit_card(self, lora.config.get("base_model_name_or_path"))
        beside = {CARD: card, CURVE: "".join(map(json_line, self.curve_rows()))}
        record = {**self.row(), "words": self.words, "told": report(self)}
        write_cut(lora, self.factors, out, record, beside)

    def apply(self) -> None:
        """Give the live model the smaller adapter: physically smaller factors in ordinary LoRA layers, and the ranks in
        PEFT's config. The fit's Trainer makes its optimizer anew if it trains on; any other optimizer still holds the
        earlier factors, so make it anew."""
        cut_live(self.model, self.factors, self.adapter)
        trainer: Any = None if self.trainer is None else self.trainer()
        if trainer is None:
            return
        trainer.model_wrapped = trainer.model  # DDP would go on averaging the old factors
        if trainer.optimizer is not None:
            live = {id(parameter) for parameter in self.model.parameters()}
            parameters = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
            if any(id(parameter) not in live for parameter in parameters):
                trainer.optimizer = trainer.lr_scheduler = None


def report(fit: Fit) -> str:
    """Write the request, the answer, its proof, and the table of the sizes that were measured."""
    limit = fit.tolerance
    promise = f"asked       {fit.promise}{f' ({fit.why})' if fit.why else ''}"
    lines = [promise, answer(fit), *_metrics(fit), *_proof(fit)]
    if fit.place is not None and (names := [name for name in fit.place.dropped(fit.ranks) if not fit.ranks[name]]):
        lines.append(f"without     the LoRA of {' and '.join(names)}, which {fit.place.title} leaves out")
    if limit.gain is not None:
        gain = f"{limit.gain.mean:.4f} ± {limit.gain.error:.4f} of the {fit.measure} over {fit.base}"
        if limit.of == "gain":
            gain += f"; {limit.value:.1%} of it is {limit.loss:.4f}"
        lines.append(f"won         {gain}")
    if fit.rows:
        lines.append(f"rows        {fit.rows}")
    if fit.seconds:
        lines.append(f"took        {fit.seconds:.0f} s, of which the fit as long as {fit.steps:.0f} training steps")
    if fit.verdict != FLAT:
        lines.append(f"verdict     {fit.words}")
    heads = {"answers": "answers that change", "accuracy": "points of the accuracy lost"}
    return "\n".join([*lines, "", f"{heads.get(fit.decides, f'rise of the {fit.measure}')}, by rank", *_curve(fit)])


def answer(fit: Fit) -> str:
    """Say how much smaller the adapter is, in words that need no glossary."""
    size, whole = fit.chosen, fit.whole
    smaller, of = shown_megabytes(fit.megabytes(size)), shown_megabytes(fit.megabytes(whole))
    if fit.is_whole:
        return f"kept        everything: {size.parameters:,} parameters, {of}"
    proved = "clearly beyond the tolerance" if fit.beyond(size) else "not proved"
    common = mode(size.ranks.values())
    most = f" ({common} in most layers)" if common < size.rank else ""
    why = f"asked for, and {proved}: " if fit.by_rank and not size.accepted else ""
    return (
        f"smaller     {why}rank {size.rank} of {whole.rank}{most}: {smaller} of {of}, {size.parameters:,} parameters, "
        f"{size.share:.1%} of the adapter"
    )


def _proof(fit: Fit) -> list[str]:
    """Write a line for each measure of the chosen size; the last one decides."""
    if fit.is_whole or (proof := fit.chosen.proof) is None:
        return []
    limit, lines = fit.tolerance, proof.lines()
    if proof.rise is not None:
        (low, high), batches = proof.rise.interval(), proof.rise.batches
        change = f"rises by {proof.rise.mean:+.4f} [{low:+.4f}, {high:+.4f}] (95 %) on {batches} batches"
        lines.append(f"loss        the {fit.measure} {change}")
    if limit.of == "accuracy":
        bound = 100 * limit.estimate(proof).upper()
        return [*lines, f"proof       {limit.says(proof)}, at most by {bound:.2f} (95 %); {limit} may be given up"]
    by_loss = limit.of == "gain"
    decides = lines.pop(-1 if by_loss else 0)
    allowed = f"{limit.loss:.4f}" if by_loss else str(limit)
    return [*lines, f"proof       {decides[12:]}; {allowed} may be given up"]


def _curve(fit: Fit) -> list[str]:
    """Write the table of the sizes that were measured, with an arrow at the chosen one."""
    heads = {"answers": "change", "accuracy": "points lost"}
    lines = [f"    {'rank':>4}  {'parameters':>13}  {'share':>6}  {heads.get(fit.decides, 'rises by'):>17}  batches"]
    for each in fit.curve:
        arrow, value, batches = "->" if each.ranks == fit.ranks else "", "", ""
        if each.proof is not None:
            estimate = fit.tolerance.estimate(each.proof)
            mean, error = estimate.mean, estimate.error
            value = {
                "answers": f"{mean:.2%} ± {error:.2%}",
                "accuracy": f"{100 * mean:+.2f} ± {100 * error:.2f}",
            }.get(fit.decides, f"{mean:+.4f} ± {error:.4f}")
            batches = str(each.proof.batches)
        status = "beyond" if fit.beyond(each) else "not proved"
        status = {None: "", True: "accepted", False: status}[each.accepted]
        size = f"{arrow:2}  {each.rank:4}  {each.parameters:13,}  {each.share:6.1%}"
        lines.append(f"{size}  {value:>17}  {batches:>7}  {status}".rstrip())
    return lines


def _metrics(fit: Fit) -> list[str]:
    """Write a line for each metric on the held-out rows, and the interval of the change of the accuracy."""
    lines, result = [], fit.metrics
    for name in result.get("whole", {}):
        values = {which: each[name] for which, each in result.items() if name in each}
        both = " -> ".join(f"{values[which]:.4f}" for which in ("whole", "smaller") if which in values)
        base = f" (base {values['base']:.4f})" if "base" in values else ""
        lines.append(f"metric      {name} {both}{base}")
    pairs = fit.chosen.proof.pairs if fit.chosen.proof else None
    if pairs is not None and not fit.is_whole:
        lines.append(str(pairs))
    return lines


def fit_card(result: Fit, base: str | None) -> str:
    """Write the model card of the smaller adapter to the base model of this name, with the report as its proof."""
    adapted = shown_ranks([rank for rank in result.ranks.values() if rank])
    metrics = list(result.metrics.get("whole", {}))
    rows = {"base model": shown_name(base), "adapted": adapted}
    title, text = "A LoRA, kept whole" if result.is_whole else "A smaller LoRA", str(replace(result, seconds=0.0))
    return adapter_card(title, rows, text=f"```\n{text}\n```", base=base, metrics=metrics)

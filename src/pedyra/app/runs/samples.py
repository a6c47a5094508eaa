"""`pedyra prove --samples`: two models have answered a task of lm-evaluation-harness, and their files are paired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pedyra.errors import UserError
from pedyra.fitting.prove import CANNOT_TELL, NO_WORSE, Margin, Measurement, Proof, compare

MEAN = 100  # a mean takes so many documents; with fewer its bound misses falls that few documents bear


class _Sample(BaseModel):
    """An answered document; the value of each metric stands under its name (`SampleResult` of lm_eval 0.4)."""

    model_config = ConfigDict(extra="allow")
    doc_id: int
    filter: str
    metrics: list[str]
    doc_hash: str
    prompt_hash: str
    target_hash: str


@dataclass(frozen=True, kw_only=True)
class SamplesProof(Proof):
    """A proof by two files of samples."""

    other_prompts: int
    """This number of documents was asked by other prompts, as with other examples or another chat template."""

    def row(self) -> dict[str, Any]:
        row = {**super().row(), "measure": self.metric, "other_prompts": self.other_prompts}
        return {name: value for name, value in row.items() if name not in ("loss_a", "loss_b")}

    def __str__(self) -> str:
        best, worst, value = (self._beside(each) for each in (self.lower, self.upper, self.difference))
        bound = f"at worst {worst}" if self.verdict == NO_WORSE else f"at best {best}"
        bound = f"and it may be {best} or {worst}" if self.verdict == CANNOT_TELL else bound
        more = f"; about {self.enough:,} documents would tell" if self.enough else ""
        pairs = f", {self.pairs.lost} right in A alone and {self.pairs.gained} in B alone" if self.pairs else ""
        prompts = f"; the prompts of {self.other_prompts:,} differ, which counts too" if self.other_prompts else ""
        return (
            f"{self.verdict}: {self.metric} of B is {value}, {bound} (95 %); the margin is {self.margin_text}{more}\n"
            f"A           {self.a}\n"
            f"B           {self.b}\n"
            f"metric      {self.metric} {self.metric_a:.4f} -> {self.metric_b:.4f}; higher counts as better\n"
            f"documents   {self.rows:,}, the same for both{pairs}{prompts}"
        )

    def _beside(self, worse: float) -> str:
        away = f"{abs(worse):.4g}" if self.pairs is None else f"{100 * abs(worse):.2f} points"
        return f"{away} {'lower' if worse > 0 else 'higher'}" if worse else "as high as that of A"


def prove_samples(a: Path, b: Path, margin: str | None, metric: str | None, name: str | None) -> SamplesProof:
    """Prove by two `samples_*.jsonl` of one task that B is no worse than A; no model is loaded.

    Args:
        margin: points, or a number of the metric, of which higher counts as better; None: a point of one of 0 and 1.
        metric, name: the metric and the filter that are compared; None where there is one.
    """
    in_a, in_b = _read(a, name), _read(b, name)
    for doc in in_a.keys() & in_b.keys():
        if (in_a[doc].doc_hash, in_a[doc].target_hash) != (in_b[doc].doc_hash, in_b[doc].target_hash):
            raise UserError(f"document {doc} of {a} is another in {b}; give samples of one task")
    if apart := sorted(in_a.keys() ^ in_b.keys()):
        lacking = b if apart[0] in in_a else a
        raise UserError(
            f"{lacking} lacks document {apart[0]}; {len(apart)} are in one file alone; answer all with both"
        )
    metric = _only("metric", {each for one in in_a.values() for each in one.metrics}, metric, a)
    values = [[_value(side[doc], metric, path) for doc in in_a] for side, path in ((in_a, a), (in_b, b))]
    is_share = all(value in (0, 1) for side in values for value in side)
    limit = Margin.read(margin or ("1pt" if is_share else "1%"), metric)
    if limit.of == "gain" or (limit.of == "accuracy" and not is_share):
        raise UserError(f"margin is {margin}; give a number (--margin '0.01 {metric}'), or 1pt where it is 0 or 1")
    if not is_share and len(in_a) < MEAN:
        raise UserError(f"{a} has {len(in_a)} documents, and the mean of {metric} takes {MEAN}; answer more with both")
    with_a, with_b = (
        Measurement([-x for x in side], {metric: fmean(side)}, [x == 1 for x in side] if is_share else None)
        for side in values
    )
    limit = Margin(limit.value, "accuracy" if is_share else "loss", limit.text)
    rows, others = len(in_a), sum(one.prompt_hash != in_b[doc].prompt_hash for doc, one in in_a.items())
    proof = compare(with_a, with_b, limit, weights=[1.0] * rows, rows=rows, a=str(a), b=str(b))
    return SamplesProof(**vars(proof), other_prompts=others)


def _read(path: Path, name: str | None) -> dict[int, _Sample]:
    """Read the samples of this filter, or of the only one, by their document."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            every = [_Sample.model_validate_json(line) for line in lines]
    except ValidationError as error:
        what = " ".join(map(str, [*error.errors()[0]["loc"], error.errors()[0]["msg"]]))
        raise UserError(f"{path}: {what}; give a samples_*.jsonl of lm_eval --log_samples") from None
    name = _only("filter", {each.filter for each in every}, name, path)
    samples = [each for each in every if each.filter == name]
    if len(documents := {each.doc_id: each for each in samples}) < len(samples):
        raise UserError(f"{path} holds a document more than once; give the file of one run")
    return documents


def _only(what: str, names: set[str], name: str | None, path: Path) -> str:
    """Return the name that was chosen, or the only one there is."""
    if len(names) != 1 if name is None else name not in names:
        raise UserError(f"{path} has of {what}s: {', '.join(sorted(names)) or 'none'}; give one of them, --{what} NAME")
    return name or next(iter(names))


def _value(sample: _Sample, metric: str, path: Path) -> float:
    value = (sample.model_extra or {}).get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {metric} of document {sample.doc_id} is {str(value)[:40]}, no number; take another")
    return value

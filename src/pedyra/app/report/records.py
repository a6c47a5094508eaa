"""A run folder is read into one record.

The report knows a run by these files and nothing else: `recipe.yaml` and `metrics.jsonl`, which every run has,
`ranks.jsonl` (of rank-adaptive methods), `samples.jsonl` (where texts were generated), `environment.json`, and
`fit/pedyra_fit.json` and `fit/pedyra_fit_curve.jsonl` (of one that was fitted).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedyra.app.runs.run_folder import run_of
from pedyra.app.yaml_file import read_settings
from pedyra.errors import UserError
from pedyra.lora.files import read_json, read_rows

Record = dict[str, Any]

# The last line of metrics.jsonl, and the first of ranks.jsonl, in a run that has no such line.
UNFINISHED: Record = {
    **dict.fromkeys(("metric", "value", "eval_loss", "seconds", "peak_memory_bytes", "trainable_parameters")),
    **{"step": 0, "final": False, "best_step": None},
}
NO_RANKS: Record = {"layers": [], "budget": {"parameters": None}, "schedule": {"total_steps": None}}


@dataclass(frozen=True)
class Layer:
    """A layer has a place in the model, and the rank that it started with."""

    name: str
    type: str
    depth: int | None  # the number of its block, None outside of any block
    rank: int
    short_name: str  # type and depth, or the module path where these are another's too, as with the experts of a block


@dataclass(frozen=True)
class RunRecords:
    """What the report knows of a run. Lists are in order of step; absent values are empty."""

    path: Path
    recipe: Record
    environment: Record
    metrics: list[Record]  # Trainer logs, without the final line
    final: Record  # the last line; of a run that is not finished "final" is False in it
    layers: list[Layer]
    header: Record  # the "layers" line of ranks.jsonl: budget, schedule
    snapshots: list[Record]
    adjustments: list[Record]
    samples: list[Record]  # what the model wrote, and to what
    fit: Record  # what the run's fit found and took; {} where there was none
    curve: list[Record]  # the sizes that it measured, and the whole adapter

    @property
    def start_ranks(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def places(self) -> dict[str, tuple[str, int | None]]:
        """Give each layer its module type and depth."""
        return {layer.name: (layer.type, layer.depth) for layer in self.layers}

    @property
    def final_ranks(self) -> dict[str, int]:
        """Ranks of the adapter that was saved: the best one's, where that is of an earlier step."""
        return self._final["ranks"] if self._final else self.start_ranks

    @property
    def parameters(self) -> int | None:
        """Count those of the factors of the adapter that was saved, without a head; None where nothing tells."""
        if self._final and self._final["parameters"] is not None:
            return self._final["parameters"]
        return max((row["parameters"] for row in self.curve), default=None)

    @property
    def _final(self) -> Record:
        """Return the last state that the adapter that was saved was in; {} where there is none."""
        best = self.final["best_step"]
        last = math.inf if best is None else best
        states = sorted(self.snapshots + self.adjustments, key=lambda record: record["step"])
        return next((state for state in reversed(states) if state["step"] <= last), {})


def read_run(path: Path) -> RunRecords:
    """Read a run folder; the line about a missing or damaged file names it, and the repair."""
    if (run := run_of(path)) not in (None, path):
        raise UserError(f"{path} is a part of a run; give the run folder, {run}")
    environment, fit = path / "environment.json", path / "fit" / "pedyra_fit.json"
    metrics = read_rows(path / "metrics.jsonl", {"step": int})
    if not metrics:
        raise UserError(f"{path / 'metrics.jsonl'} is missing or empty: a report needs a logged step; train the run")
    ranks = [_with_nan(row) for row in read_rows(path / "ranks.jsonl", {"kind": str})]
    header = NO_RANKS | next((row for row in reversed(ranks) if row["kind"] == "layers"), {})
    # A resumed run may write a step again: the later line is the one that counts.
    last = {(record["kind"], record["step"]): record for record in ranks if record["kind"] != "layers"}
    states = sorted(last.values(), key=lambda record: record["step"])
    return RunRecords(
        path=path.resolve(),
        recipe=read_settings(path / "recipe.yaml", [], what="recipe", starts_with="method"),
        environment=read_json(environment) if environment.is_file() else {},
        metrics=sorted((record for record in metrics if not record.get("final")), key=lambda record: record["step"]),
        final=UNFINISHED | next((record for record in reversed(metrics) if record.get("final")), {}),
        layers=make_layers(header["layers"]),
        header=header,
        snapshots=[record for record in states if record["kind"] == "snapshot"],
        adjustments=[record for record in states if record["kind"] == "adjustment"],
        samples=read_rows(path / "samples.jsonl"),
        fit=read_json(fit) if fit.is_file() else {},
        curve=read_rows(path / "fit" / "pedyra_fit_curve.jsonl"),
    )


def _with_nan(row: Record) -> Record:
    """Read null in the numbers of layers as NaN, for which it stands where a run has diverged."""
    for key in {"layer_scores", "effective_rank"} & row.keys():
        row[key] = {name: math.nan if value is None else value for name, value in (row[key] or {}).items()}
    return row


def make_layers(rows: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Make layers of the `name`, `type`, `depth`, `rank` rows of ranks.jsonl, in their order."""
    depths = [row["depth"] if any(part.isdigit() for part in row["name"].split(".")) else None for row in rows]
    places = [
        row["type"] if depth is None else f"{row['type']} {depth}" for row, depth in zip(rows, depths, strict=True)
    ]
    counts = Counter(places)
    return [
        Layer(row["name"], row["type"], depth, row["rank"], place if counts[place] == 1 else row["name"])
        for row, depth, place in zip(rows, depths, places, strict=True)
    ]

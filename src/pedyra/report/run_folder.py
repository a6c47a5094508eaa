"""A run folder read into one record, checked as it is read.

The report knows a run by five files and nothing else: `recipe.yaml` and `metrics.jsonl`, which every run has,
`ranks.jsonl` (of rank-adaptive methods), `samples.jsonl` (where texts were generated) and `environment.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedyra.files import read_rows
from pedyra.yaml_file import read_settings

Record = dict[str, Any]

# What a line of ranks.jsonl must hold, by its kind.
_RANKS: dict[str, dict[str, type]] = {
    "layers": {"layers": list},
    "snapshot": {"step": int, "ranks": dict},
    "adjustment": {"step": int, "ranks": dict, "layer_scores": dict, "pruned": list, "added": dict},
}
_LAYER = {"name": str, "type": str, "depth": int, "rank": int}


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: where it sits in the model and the rank it started with.

    `depth` is the number of its block, None outside of any block. `short_name` is type and depth, the full module path
    where these do not tell the layer from another, as with the experts of a block.
    """

    name: str
    type: str
    depth: int | None
    rank: int
    short_name: str


@dataclass(frozen=True)
class Run:
    """Everything the report knows about one run. Lists are in order of step; absent values are empty."""

    path: Path
    label: str
    recipe: Record
    environment: Record
    metrics: list[Record]  # Trainer logs, without the final line
    final: Record  # the last line of a finished run, or {}
    layers: list[Layer]
    header: Record  # the "layers" line of ranks.jsonl: budget, schedule, config
    snapshots: list[Record]
    adjustments: list[Record]
    samples: list[Record]  # what the model wrote, and to what
    fit: list[Record]  # the curve of `pedyra fit RUN`

    @property
    def start_ranks(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def final_ranks(self) -> dict[str, int]:
        """Of the adapter that was saved: the best one's, where that is an earlier step's."""
        last = self.final.get("best_step", math.inf)
        states = sorted(self.snapshots + self.adjustments, key=lambda record: record["step"])
        return next((state["ranks"] for state in reversed(states) if state["step"] <= last), self.start_ranks)


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read run folders and give each a label that tells it from the others.

    Raises:
        ValueError: no folder given, a folder or one of its required files is missing, or a line is not what
            the format says; the message names the file, the line and the repair.
    """
    if not run_dirs:
        raise ValueError("run_dirs is empty: a report needs at least one run folder; pass one")
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{[str(path) for path in run_dirs]} names a run twice: runs must differ; drop the copy")
    depth = 1  # the shortest tail of each path, the same number of parts for all, that makes the labels differ
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def read_run(path: Path, label: str | None = None) -> Run:
    """Read one run folder. Raises ValueError as `read_runs` does."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: a report is made from a run folder; check the path")
    environment = {}
    if (path / "environment.json").exists():  # JSON is YAML, too
        environment = read_settings(path / "environment.json", [], what="environment", starts_with="seed")
    metrics = _rows(path / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{path / 'metrics.jsonl'} is missing or empty: a report needs a logged step; train the run")
    for number, record in enumerate(metrics, start=1):
        _require(record, {"step": int}, f"{path / 'metrics.jsonl'}, line {number}")
    ranks = _rows(path / "ranks.jsonl")
    for number, record in enumerate(ranks, start=1):
        _check_ranks(record, f"{path / 'ranks.jsonl'}, line {number}")
    headers = [record for record in ranks if record["kind"] == "layers"]
    header = headers[-1] if headers else {}
    layers = make_layers(header.get("layers", []))
    # A resumed run may write a step again: the later line is the one that counts.
    last = {(record["kind"], record["step"]): record for record in ranks if record["kind"] != "layers"}
    states = sorted(last.values(), key=lambda record: record["step"])
    for record in states:
        _check_names(record, layers, path / "ranks.jsonl")
        record |= {key: _with_nan(record[key]) for key in ("layer_scores", "effective_rank") if record.get(key)}
    return Run(
        path=path,
        label=label or path.resolve().name,
        recipe=read_settings(path / "recipe.yaml", [], what="recipe", starts_with="method"),
        environment=environment,
        metrics=sorted((record for record in metrics if not record.get("final")), key=lambda record: record["step"]),
        final=next((record for record in reversed(metrics) if record.get("final")), {}),
        layers=layers,
        header=header,
        snapshots=[record for record in states if record["kind"] == "snapshot"],
        adjustments=[record for record in states if record["kind"] == "adjustment"],
        samples=_rows(path / "samples.jsonl"),
        fit=_fit(path / "fit" / "pedyra_fit_curve.jsonl"),
    )


def _fit(path: Path) -> list[Record]:
    rows = _rows(path)
    for number, row in enumerate(rows, start=1):
        _require(row, {"parameters": int, "share": float, "predicted_cost": float}, f"{path}, line {number}")
    return [row for row in rows if row.get("measured_cost") is not None]


def make_layers(rows: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Layers of the `name`, `type`, `depth`, `rank` rows of ranks.jsonl, in their order."""
    depths = [row["depth"] if any(part.isdigit() for part in row["name"].split(".")) else None for row in rows]
    places = Counter((row["type"], depth) for row, depth in zip(rows, depths, strict=True))

    def short_name(row: Mapping[str, Any], depth: int | None) -> str:
        if places[row["type"], depth] > 1:
            return row["name"]
        return row["type"] if depth is None else f"{row['type']} {depth}"

    return [
        Layer(row["name"], row["type"], depth, row["rank"], short_name(row, depth))
        for row, depth in zip(rows, depths, strict=True)
    ]


def _rows(path: Path) -> list[Record]:
    try:
        rows = read_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text; restore the file") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {str(row)[:40]!r} is no JSON object; repair or delete the line")
    return rows


def _require(record: Record, kinds: Mapping[str, type], where: str) -> None:
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
            found = repr(record[key])[:40] if key in record else "nothing"
            raise ValueError(f"{where}: {key} is {found}, must be {kind.__name__}; repair or delete the line")


def _check_ranks(record: Record, where: str) -> None:
    kind = record.get("kind")
    if kind not in _RANKS:
        raise ValueError(f"{where}: kind is {kind!r}, must be {', '.join(_RANKS)}; repair or delete the line")
    _require(record, _RANKS[kind], where)
    for layer in record.get("layers", []):
        if not isinstance(layer, dict):
            raise ValueError(f"{where}: layer {layer!r} must be an object; repair the line")
        _require(layer, _LAYER, where)


def _check_names(record: Record, layers: Sequence[Layer], path: Path) -> None:
    odd = sorted(set(record["ranks"]) ^ {layer.name for layer in layers})
    if odd:
        raise ValueError(
            f"{path}: the {record['kind']} at step {record['step']} and the first line disagree about layer "
            f"{odd[0]!r}; all lines must name the same layers: is the file a mix of two runs?"
        )


def _with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    """A diverged run's values; the file has null for what is no number."""
    return {name: math.nan if value is None else value for name, value in values.items()}

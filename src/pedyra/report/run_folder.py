"""A run folder read into one record, checked as it is read.

The report knows a run by four files and nothing else: ``recipe.yaml``, ``metrics.jsonl``, ``ranks.jsonl`` (a
fixed-rank run may lack it) and ``environment.json`` (may be absent: then the page says "not recorded").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pedyra.report.layers import Layer, make_layers, rows_of_ranks

Record = dict[str, Any]


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
    paths = [Path(run_dir) for run_dir in run_dirs]
    return [read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def read_run(path: Path, label: str | None = None) -> Run:
    """Read one run folder. Raises ValueError as `read_runs` does."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: a report is made from a run folder; check the path")
    metrics = _read_lines(path / "metrics.jsonl", _check_metric)
    ranks = _read_lines(path / "ranks.jsonl", _check_rank_record) if (path / "ranks.jsonl").exists() else []
    for record in ranks:
        record.update({name: _with_nan(record[name]) for name in NUMBERS if record.get(name) is not None})
    headers = [record for record in ranks if record["kind"] == "layers"]
    states = _last_of_each_step([record for record in ranks if record["kind"] != "layers"])
    finals = [record for record in metrics if record.get("final")]
    header = headers[-1] if headers else {}
    layers = _layers(header, states)
    _check_layer_names(path / "ranks.jsonl", layers, states)
    return Run(
        path=path,
        label=label or path.resolve().name,
        recipe=_read_recipe(path / "recipe.yaml"),
        environment=_read_environment(path / "environment.json"),
        metrics=sorted((r for r in metrics if not r.get("final")), key=lambda record: record["step"]),
        final=finals[-1] if finals else {},
        layers=layers,
        header=header,
        snapshots=[record for record in states if record["kind"] == "snapshot"],
        adjustments=[record for record in states if record["kind"] == "adjustment"],
    )


def _labels(paths: list[Path]) -> list[str]:
    """The shortest tail of each path, the same number of parts for all, that makes the labels differ."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{[str(p) for p in paths]} names a run twice: runs must differ; drop the copy")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]


def _read_lines(path: Path, check: Callable[[Record, str], None]) -> list[Record]:
    records = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: {line[:40]!r} is not JSON ({error.msg}); every line must be one JSON object: "
                "delete the line if it was cut off, or run the training again"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {line[:40]!r} is not a JSON object; repair or delete the line")
        check(record, where)
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: a report needs at least one logged step; train the run first")
    return records


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a run folder holds {path.name}; is this the folder of a run?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text; restore the file") from None


def _require(record: Record, where: str, **kinds: type | tuple[type, ...]) -> None:
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
            found = repr(record[key])[:40] if key in record else "nothing"
            names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise ValueError(f"{where}: {key} is {found}, must be {names}; repair or delete the line")


def _check_metric(record: Record, where: str) -> None:
    _require(record, where, step=int)


def _check_rank_record(record: Record, where: str) -> None:
    kind = record.get("kind")
    if kind == "layers":
        _require(record, where, layers=list)
        for layer in record["layers"]:
            if not isinstance(layer, dict):
                raise ValueError(f"{where}: layer {layer!r} must be an object; repair the line")
            _require(layer, where, name=str, type=str, depth=int, rank=int)
    elif kind == "snapshot":
        _require(record, where, step=int, ranks=dict)
    elif kind == "adjustment":
        _require(record, where, step=int, ranks=dict, layer_scores=dict, pruned=list, added=dict)
    else:
        raise ValueError(
            f"{where}: kind is {kind!r}, must be layers, snapshot or adjustment; repair or delete the line"
        )


NUMBERS = ("layer_scores", "scores", "pruned", "gains", "trials", "curvature", "grad_norms", "orthogonality")
"""Entries of a record of which a diverged run has numbers that are none; the file has null for them."""


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else value


def _last_of_each_step(states: list[Record]) -> list[Record]:
    """A resumed run may write a step again: the later line is the one that counts."""
    last = {(record["kind"], record["step"]): record for record in states}
    return sorted(last.values(), key=lambda record: record["step"])


def _layers(header: Record, states: list[Record]) -> list[Layer]:
    """The layers of the header or, for a fixed-rank run that only logged snapshots, of the first snapshot."""
    if header:
        return make_layers(header["layers"])
    return make_layers(rows_of_ranks(states[0]["ranks"])) if states else []


def _check_layer_names(path: Path, layers: list[Layer], states: list[Record]) -> None:
    names = {layer.name for layer in layers}
    for record in states:
        if set(record["ranks"]) != names:
            odd = sorted(set(record["ranks"]) ^ names)[0]
            raise ValueError(
                f"{path}: the {record['kind']} at step {record['step']} and the first line disagree about layer "
                f"{odd!r}; all lines must name the same layers: is the file a mix of two runs?"
            )


def _read_recipe(path: Path) -> Record:
    try:
        recipe = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not YAML; restore the recipe the run was started with") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: {str(recipe)[:40]!r} is not a mapping; restore the recipe of the run")
    return recipe


def _read_environment(path: Path) -> Record:
    if not path.exists():
        return {}
    try:
        environment = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); restore or delete the file") from None
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: must hold a JSON object; restore or delete the file")
    return environment

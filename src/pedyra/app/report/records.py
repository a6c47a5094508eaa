"""A run folder is read into one record, whose rows are checked here and nowhere else.

The report knows a run by these files and nothing else: `recipe.yaml` and `metrics.jsonl`, which every run has,
`ranks.jsonl` (of rank-adaptive methods), `samples.jsonl` (where texts were generated), `environment.json`, and
`fit/pedyra_fit.json` and `fit/pedyra_fit_curve.jsonl` (of one that was fitted).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pedyra.app.runs.run_folder import run_of
from pedyra.app.yaml_file import one_line, read_settings
from pedyra.errors import UserError
from pedyra.lora.files import read_json, read_rows

Record = dict[str, Any]
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""JSON has null for what is no number, as in a run that diverged."""


class Row(BaseModel):
    """A line of a run's files has these fields, and may have others; one that is left out has its default."""

    model_config = ConfigDict(extra="allow")


class Metric(Row):
    step: int
    final: bool = False
    metric: str | None = None
    value: float | None = None
    eval_loss: float | None = None
    seconds: float | None = None
    train_steps_per_second: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    best_step: int | None = None


class LayerRow(Row):
    name: str
    type: str
    depth: int | None
    rank: int


class Budget(Row):
    parameters: int | None = None


class Steps(Row):
    total_steps: int | None = None


class Header(Row):
    kind: Literal["layers"]
    layers: list[LayerRow] = []
    budget: Budget = Budget()
    schedule: Steps = Steps()


class Snapshot(Row):
    kind: Literal["snapshot", "adjustment"]
    step: int
    ranks: dict[str, int]
    parameters: int | None = None
    layer_scores: dict[str, Number] | None = None
    effective_rank: dict[str, Number] | None = None
    orthogonality_ratio: Number | None = None


class Adjustment(Snapshot):
    layer_scores: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride,reportGeneralTypeIssues]
    pruned: list[tuple[str, int, float | None]]
    added: dict[str, int]


class FitRow(Row):
    rank: int
    of_rank: int
    parameters: int
    share: float
    megabytes: float
    of_megabytes: float
    measure: str = "loss"
    promise: str = "within the tolerance"
    words: str = ""
    told: str = ""


class CurveRow(Row):
    rank: int
    parameters: Annotated[int, Field(gt=0)]
    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    accepted: bool | None = None
    beyond: bool = False
    tolerance: Annotated[float, Field(ge=0)] | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer has a place in the model, and the rank that it started with.

    `depth` is the number of its block, None outside of any block. `short_name` is type and depth, the full module path
    where these do not tell the layer from another, as with the experts of a block.
    """

    name: str
    type: str
    depth: int | None
    rank: int
    short_name: str


@dataclass(frozen=True)
class RunRecords:
    """The report knows a run by this record. Lists are in order of step; absent values are empty."""

    path: Path
    recipe: Record
    environment: Record
    metrics: list[Record]  # Trainer logs, without the final line
    final: Record  # the last line; of a run that is not finished "final" is False in it
    layers: list[Layer]
    header: Record  # the "layers" line of ranks.jsonl: budget, schedule, config
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
        """Return the ranks of the adapter that was saved: the best one's, where that is of an earlier step."""
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
    """Read a run folder.

    Raises:
        ValueError: the folder or one of its required files is missing, or a line is not what the format says; the
            message names the file, the line and the repair.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: a report is made from a run folder; check the path")
    if (run := run_of(path)) not in (None, path):
        raise UserError(f"{path} is a part of a run; give the run folder, {run}")
    environment, fit = path / "environment.json", path / "fit" / "pedyra_fit.json"
    metrics = _rows(path / "metrics.jsonl", lambda row: Metric)
    if not metrics:
        raise UserError(f"{path / 'metrics.jsonl'} is missing or empty: a report needs a logged step; train the run")
    kinds = {"layers": Header, "adjustment": Adjustment}
    ranks = _rows(path / "ranks.jsonl", lambda row: kinds.get(str(row.get("kind")), Snapshot))
    headers = [record for record in ranks if record["kind"] == "layers"]
    header = headers[-1] if headers else Header(kind="layers").model_dump()
    layers = make_layers(header["layers"])
    # A resumed run may write a step again: the later line is the one that counts.
    last = {(record["kind"], record["step"]): record for record in ranks if record["kind"] != "layers"}
    states = sorted(last.values(), key=lambda record: record["step"])
    return RunRecords(
        path=path.resolve(),
        recipe=read_settings(path / "recipe.yaml", [], what="recipe", starts_with="method"),
        environment=read_json(environment) if environment.is_file() else {},
        metrics=sorted((record for record in metrics if not record["final"]), key=lambda record: record["step"]),
        final=next((record for record in reversed(metrics) if record["final"]), Metric(step=0).model_dump()),
        layers=layers,
        header=header,
        snapshots=[record for record in states if record["kind"] == "snapshot"],
        adjustments=[record for record in states if record["kind"] == "adjustment"],
        samples=read_rows(path / "samples.jsonl"),
        fit=_checked(read_json(fit), FitRow, str(fit)) if fit.is_file() else {},
        curve=_rows(path / "fit" / "pedyra_fit_curve.jsonl", lambda row: CurveRow),
    )


def make_layers(rows: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Make layers of the `name`, `type`, `depth`, `rank` rows of ranks.jsonl, in their order."""
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


def _rows(path: Path, kind_of: Callable[[Record], type[Row]]) -> list[Record]:
    """Read the rows of a file. Raises ValueError, with file and line, as `_checked` does."""
    rows = enumerate(read_rows(path), start=1)
    return [_checked(row, kind_of(row), f"{path}, line {number}") for number, row in rows]


def _checked(row: Record, kind: type[Row], where: str) -> Record:
    """Give the row the defaults of its kind. Raises ValueError, one line, where a field is not what that says."""
    try:
        return kind.model_validate(row).model_dump()
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, kind, depth=9)}") from None

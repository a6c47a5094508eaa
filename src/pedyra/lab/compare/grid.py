"""A comparison is a YAML file: methods x tasks x seeds x budgets under one protocol.

A grid looks like a recipe (`model`, `lora`, `training` are those of all runs), with `methods`, `tasks`, `seeds` and
`learning_rates` in the plural.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from pedyra.app.recipe import TRAINING_DEFAULTS
from pedyra.app.recipe_sections import LARGEST_SEED, HomePath, LoraSection, MethodSection, Section
from pedyra.app.yaml_file import one_line, read_settings, to_yaml
from pedyra.errors import UserError
from pedyra.lab.compare.named_tasks import task_data
from pedyra.lora.spelling import did_you_mean
from pedyra.methods.names import make_method, setting_names

Match = Literal["parameters", "rank"]
Judge = Literal["metric", "loss"]


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise UserError(f"{name!r} is the name of a folder too; give one without / and \\ that is not empty, . or ..")
    return name


Seeds = Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_SEED)]], Field(min_length=1)]
Budgets = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
Rates = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
Name = Annotated[str, AfterValidator(_folder_name)]


class MethodRow(Section):
    """One row of the table: a method and its own settings; `training` is the grid's, for equal steps and data order."""

    method: MethodSection
    """The method, with its settings; the default of its name is the row's own."""
    learning_rates: Rates | None = None
    """Rates to choose from; default: the grid's."""
    match: Match | None = None
    """What the row has in common with the baseline; default: the grid's. `rank` leaves lora.r as it is."""
    quantization: Literal["none", "nf4", "int8"] | None = None
    """Bits of this row's frozen weights; default: the model's. `pedyra` with nf4 is pedyra on QLoRA."""
    lora: LoraSection = LoraSection()


class TuningSection(Section):
    """How learning rates are chosen: on rows split off the training rows, never on the reported ones."""

    seeds: Seeds = [1000]
    """Seeds of the tuning runs; none of them may be a reported seed."""
    rows: int | None = Field(default=None, ge=1)
    """A tuning run trains on nine tenths of the training rows, and is evaluated on at most so many of the others."""


class Grid(Section):
    """One comparison."""

    name: str
    """Title; default: the grid's file name."""
    output_dir: HomePath
    """Folder of the comparison; default: runs/<name>."""
    model: dict[str, Any]
    lora: LoraSection = LoraSection()
    shared: dict[str, Any] = Field(default_factory=dict)
    """Settings of methods, such as their schedule, for every row whose method has them, unless the row says
    otherwise."""
    training: dict[str, Any] = Field(default_factory=dict)
    generate: dict[str, Any] = Field(default_factory=dict)
    """As in a recipe: the test sets of `pedyra eval`; training does not read them."""
    methods: dict[Name, MethodRow] = Field(min_length=1)
    """Rows of the table: a list of method names, or names with each row's own settings."""
    tasks: dict[Name, dict[str, Any]] = Field(min_length=1)
    """A list of named tasks, or names with keys of `data`."""
    data_dir: str | None = None
    """Folder of local files <task>/<split>.jsonl.gz; default: named tasks come from the Hub."""
    seeds: Seeds
    """Reported seeds: of the head, the adapter, the data order, and the rows drawn by data.train_rows."""
    budgets: Budgets | None = None
    """Budgets, each the lora.r of the baseline; default: lora.r. Scaling alpha / r is the same at every rank."""
    learning_rates: Rates = [TRAINING_DEFAULTS["learning_rate"]]
    """Rates to choose from, for every method without its own; one alone is used as it is."""
    tuning: TuningSection = TuningSection()
    match: Match = "parameters"
    """All methods have the same number of trainable parameters (within 5 %), or the same lora.r."""
    judge: Judge = "metric"
    """Rates are chosen and rows compared by each task's own metric, or by the loss, which is far less noisy."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        """Make mappings of lists of names, and give each row its method."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for key in ("methods", "tasks"):
            if isinstance(data.get(key), list):
                data[key] = dict.fromkeys(data[key])
            if isinstance(data.get(key), dict):
                data[key] = {str(name): value or {} for name, value in data[key].items()}
        methods = data.get("methods")
        if isinstance(methods, dict):
            for name, row in methods.items():
                method = row.get("method") or {} if isinstance(row, dict) else None
                if isinstance(method, dict):  # without a name of its own, the row's
                    methods[name] = {**row, "method": {"name": name, **method}}
        if "name" in data:
            data.setdefault("output_dir", f"runs/{data['name']}")
        return data

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: dict[str, MethodRow]) -> dict[str, MethodRow]:
        for name, row in methods.items():
            for key in ("r", "alpha"):
                if key in row.lora.model_fields_set:
                    raise UserError(f"methods.{name}.lora.{key} follows from budgets and match; remove it")
        return methods

    @model_validator(mode="after")
    def _shares_what_methods_have(self) -> Grid:
        # PE-DyRA's too, so that a grid can be cut to some of its methods and keep `shared`.
        methods = ("pedyra", *(row.method.name for row in self.methods.values()))
        names = {key for name in methods for key in setting_names(name)} if self.shared else ()
        for key in self.shared:
            if key not in names:
                raise UserError(f"shared.{key} is a setting of no method; {did_you_mean(key, names)}")
        for name, row in self.methods.items():
            if self.shared:
                make_method(row.method.name, self.settings_of(name))
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Grid:
        shared = set(self.seeds) & set(self.tuning.seeds)
        if shared and any(len(self.rates(name)) > 1 for name in self.methods):
            raise UserError(f"seed {min(shared)} is in seeds and in tuning.seeds; tune on seeds that are not reported")
        if "learning_rate" in self.training:
            raise UserError("training.learning_rate is given; a grid has it as learning_rates: [...]")
        if self.training.get("load_best_model_at_end"):
            raise UserError(
                "training.load_best_model_at_end chooses each run's step on the rows that are reported; leave it out"
            )
        for label, settings in self.tasks.items():
            task_data(label, settings, self.data_dir)
        return self

    @property
    def baseline(self) -> str:
        """Return the row that the others are matched and compared with: lora, or the first."""
        return "lora" if "lora" in self.methods else next(iter(self.methods))

    @property
    def all_budgets(self) -> list[int]:
        """Return the ranks of the baseline to compare at."""
        return self.budgets or [self.lora.r]

    def rates(self, method: str) -> list[float]:
        """Return the learning rates of a row, lowest first; one alone is used as it is, without tuning."""
        return sorted(self.methods[method].learning_rates or self.learning_rates)

    def settings_of(self, method: str) -> dict[str, Any]:
        """Return the method's settings of a row: the shared ones that its class has, and the row's own over them."""
        row = self.methods[method].method
        if not self.shared:
            return row.settings
        names = setting_names(row.name)
        return {key: value for key, value in self.shared.items() if key in names} | row.settings

    def match_of(self, method: str) -> Match:
        return self.methods[method].match or self.match

    def lora_of(self, method: str) -> dict[str, Any]:
        """Return the keys of `lora` that are set for a row: the grid's, and the row's own over them."""
        shared, own = (each.model_dump(exclude_unset=True) for each in (self.lora, self.methods[method].lora))
        return shared | own

    def to_yaml(self) -> str:
        """Write the keys that are set; `load_grid` reads an equal grid from them."""
        return to_yaml(self.model_dump(mode="json", exclude_unset=True))


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a YAML grid, apply `key.path=value` overrides and check it. Raises ValueError, one line, as `load_recipe`
    does, and for settings that would make the comparison unfair."""
    path = Path(path)
    content = read_settings(path, overrides, what="grid", starts_with="methods")
    content.setdefault("name", path.stem)
    return check_grid(content, path.name)


def check_grid(content: dict[str, Any], where: str) -> Grid:
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, Grid, depth=4)}") from None

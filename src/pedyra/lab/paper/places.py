"""Where models and data of the recipes are: on the Hub, in packages, or where the user says; and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pedyra.app.recipe import Recipe, check_recipe
from pedyra.app.tasks.named_tasks import HUB, TEST_SETS, known_test_set, task_data
from pedyra.lab.paper.item import Item, Scale, recipe
from pedyra.lora.hub import why_not_on_hub

GENERATED = ("toy", "reviews", "planted")
"""Sources that need no file of the user's."""


@dataclass(frozen=True)
class Missing:
    """A model or data set that is not here."""

    kind: Literal["model", "data"]
    name: str
    """Of a model; of data its file, below the folder DIR that the user may give."""
    why: str


@dataclass(frozen=True)
class Places:
    """What the user has where."""

    data_dir: Path | None = None
    """Folder of <task>/<split>.jsonl, also .gz, in the place of data sets on the Hub."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Name in a recipe -> what to load in its place: a folder, or another name."""

    @classmethod
    def parse(cls, data_dir: Path | None, models: Iterable[str]) -> Places:
        """From the command line: models are NAME=PATH. Raises ValueError."""
        if data_dir is not None and not data_dir.is_dir():
            raise ValueError(
                f"--data-dir {data_dir} is no folder; it holds <task>/train.jsonl.gz, e.g. sst2/train.jsonl.gz"
            )
        found = {}
        for pair in models:
            name, equals, path = pair.partition("=")
            if not (name and equals and path):
                raise ValueError(f"--model is {pair!r}; it is NAME=PATH, e.g. facebook/bart-large=models/bart")
            found[name] = path
        return cls(data_dir, found)

    def resolve(self, name: str) -> Recipe:
        """The recipe of this name with its model and data where they are."""
        content = recipe(name).model_dump(mode="json", exclude_unset=True)
        content["model"]["name"] = self.models.get(content["model"]["name"], content["model"]["name"])
        task = task_name(content["data"])
        if task is not None and self.data_dir is not None:
            local = task_data(task, None, str(self.data_dir))
            for key in ("source", "config", "split", "validation", "extra_validation"):
                content["data"].pop(key, None)
            content["data"] |= {key: local[key] for key in ("source", "validation", "extra_validation") if key in local}
            for test_set, settings in content.get("generate", {}).items():
                if test_set in TEST_SETS:
                    settings["source"] = known_test_set(test_set, str(self.data_dir))["source"]
        return check_recipe(content, f"{name}.yaml")

    def missing(self, item: Item, scale: Scale) -> list[Missing]:
        """What the item needs at this scale and what is not here."""
        found: dict[Missing, None] = {}
        for name in dict.fromkeys(cell.recipe for cell in item.cells(scale)):
            found |= dict.fromkeys(_missing(self.resolve(name), task_name(recipe(name).data.model_dump())))
        return list(found)


def task_name(data: Mapping[str, Any]) -> str | None:
    """The known task whose Hub data set this is; None for any other."""
    for name in HUB:
        known = task_data(name, None, None)
        if (known["source"], known["config"]) == (data["source"], data.get("config")):
            return name
    return None


def needs(item: Item, scale: Scale) -> dict[str, Any]:
    """The models and data sets that a scale names."""
    recipes = [recipe(name) for name in item.scales[scale].recipes.values()]
    data = (each.data for each in recipes)
    return {
        "model": list(dict.fromkeys(each.model.name for each in recipes)),
        "data": list(dict.fromkeys(each.source + (f"/{each.config}" if each.config else "") for each in data)),
    }


def told(missing: Iterable[Missing]) -> list[str]:
    """One line for each reason why something is not here: what it is, and how to give it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in missing:
        reasons.setdefault((each.kind, each.why), []).append(each.name)
    repair = {"model": "give a copy with --model NAME=PATH", "data": "give the files with --data-dir DIR"}
    return [f"{kind} {', '.join(names)}: {why}; {repair[kind]}" for (kind, why), names in reasons.items()]


def _missing(resolved: Recipe, task: str | None) -> Iterable[Missing]:
    name = resolved.model.name
    if (why := why_no_model(name)) is not None:
        yield Missing("model", name, why)
    for source in dict.fromkeys(s for s in (resolved.data.source, _held_out(resolved)) if s):
        if (why := why_no_data(source)) is not None:
            yield Missing("data", source if ".jsonl" in source else f"DIR/{task or 'TASK'}/train.jsonl.gz", why)


def _held_out(resolved: Recipe) -> str | None:
    """A validation file; None for a split of the same data set."""
    validation = resolved.data.validation
    return validation if validation and ".jsonl" in validation else None


@cache
def why_no_model(name: str) -> str | None:
    """Why this model cannot be had; None if it can."""
    from pedyra.app.models.base import PACKAGED

    if name in PACKAGED:
        try:
            PACKAGED[name]()
        except (ImportError, ValueError) as error:
            return str(error)
        return None
    if name.startswith(("tiny-", "planted-")) or Path(name).exists():
        return None
    return why_not_on_hub(name, "model", None)


@cache
def why_no_data(source: str) -> str | None:
    """Why this data cannot be had; None if it can."""
    if source in GENERATED or Path(source).is_file():
        return None
    if ".jsonl" in source:
        return "no such file"
    return why_not_on_hub(source, "dataset", None)

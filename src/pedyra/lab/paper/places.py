"""The places of the recipes' models and data: the Hub, or the user's folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pedyra.app.known_sets import TEST_SETS
from pedyra.app.recipe import Recipe, check_recipe
from pedyra.errors import UserError
from pedyra.lab.compare.named_tasks import HUB, local_file, task_data
from pedyra.lab.paper.item import RECIPES, recipe
from pedyra.lora.spelling import did_you_mean


@dataclass(frozen=True)
class Places:
    """The user's folders of models and data."""

    data_dir: Path | None = None
    """Folder of <task>/<split>.jsonl, also .gz; None: the Hub."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Name in a recipe -> the folder, or the name, that is loaded."""

    @classmethod
    def parse(cls, data_dir: Path | None, models: Iterable[str]) -> Places:
        """Read the options, where models are NAME=PATH. Raises ValueError for a folder or a name that does not
        exist."""
        if data_dir is not None and not data_dir.is_dir():
            raise UserError(
                f"--data-dir {data_dir} is no folder; it holds <task>/train.jsonl.gz, e.g. sst2/train.jsonl.gz"
            )
        paths, names = {}, []
        for pair in models:
            name, equals, path = pair.partition("=")
            if not (name and equals and path):
                raise UserError(f"--model is {pair!r}; it is NAME=PATH, e.g. facebook/bart-large=models/bart")
            names = names or sorted({recipe(file.stem).model.name for file in RECIPES.glob("*.yaml")})
            if name not in names:  # the Hub's own model would be trained in its place
                raise UserError(f"--model {pair}: no recipe trains {name!r}; {did_you_mean(name, names)}")
            paths[name] = path
        return cls(data_dir, paths)

    def resolve(self, name: str) -> Recipe:
        """Return the recipe of this name with the places of its model and data."""
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


def task_name(data: Mapping[str, Any]) -> str | None:
    """Return the known task whose Hub data set this is; None for any other."""
    place = data["source"], data.get("config")
    tasks = {name: task_data(name, None, None) for name in HUB}
    return next((name for name, task in tasks.items() if (task["source"], task["config"]) == place), None)

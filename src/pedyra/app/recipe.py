"""A recipe is one training run as YAML, read and checked before torch, transformers or peft are imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from pedyra.app.recipe_sections import (
    GENERATED,
    LARGEST_SEED,
    DataSection,
    GenerateSection,
    HomePath,
    LoraSection,
    MethodSection,
    ModelSection,
    Section,
)
from pedyra.app.yaml_file import one_line, read_settings, to_yaml
from pedyra.errors import UserError
from pedyra.fitting.request import FitRequest
from pedyra.methods.names import CLASSES, NAMES, class_of, field_docs, setting_names

TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
"""A recipe's `training` starts from these; every other name keeps the default of TrainingArguments."""

NOT_HERE = {
    "output_dir": "is set by the recipe's top-level key 'output_dir'; move it there",
    "seed": "is set by the recipe's top-level key 'seed'; move it there",
    "resume_from_checkpoint": "is not read; pedyra train --resume continues a run",
    "hub_token": "would be written into the run folder and its report; log in with `hf auth login`, or set HF_TOKEN",
    "push_to_hub": "is not for a run, which pushes nothing; when it has ended: hf upload YOU/NAME OUTPUT_DIR/adapter",
}
"""TrainingArguments that a recipe refuses, with the reason."""


class Recipe(Section):
    """One training run."""

    elsewhere: ClassVar[dict[str, str]] = {
        "lora.rank": "lora.r",
        "r": "lora.r",
        **{name: f"training.{name}" for name in (*TRAINING_DEFAULTS, "max_steps", "weight_decay", "warmup_steps")},
    }
    """A key in the wrong place -> the right key."""

    name: str
    """Title of the run; default: the recipe's file name."""
    method: MethodSection = MethodSection()
    """Fine-tuning method, with its settings."""
    output_dir: HomePath
    """Run folder; default: runs/<name>."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the split, the head, the adapter, the data order and the allocator."""
    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    generate: dict[str, GenerateSection] = Field(default_factory=dict)
    """Test set -> how the model answers it in its own words; see `pedyra eval`. seq2seq has ROUGE without it."""
    fit: FitRequest | None = None
    """Fit the adapter at the end of the run, and keep both. None: no fit."""
    training: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """Arguments of transformers.TrainingArguments, by name."""

    @model_validator(mode="before")
    @classmethod
    def _default_output_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and "output_dir" not in data and "name" in data:
            return {**data, "output_dir": f"runs/{data['name']}"}
        return data

    @model_validator(mode="after")
    def _only_language_models_generate(self) -> Recipe:
        if self.generate and self.data.kind not in GENERATED:
            raise UserError(f"generate is for data.kind {' and '.join(GENERATED)}, not {self.data.kind}; remove it")
        return self

    @field_validator("training")
    @classmethod
    def _training_settings(cls, training: dict[str, Any]) -> dict[str, Any]:
        for key, why in NOT_HERE.items():
            if training.get(key) not in (None, "") and training[key] is not False:
                raise UserError(f"training.{key} {why}")
        return {**TRAINING_DEFAULTS, **training}

    def to_yaml(self) -> str:
        """Write the resolved recipe with every default; `load_recipe` of it gives an equal recipe."""
        return to_yaml(self.model_dump(mode="json"))


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Select what decides the outcome of a run: no places of files, and no questions asked afterwards."""
    sections = {key: value for key, value in recipe.items() if key not in ("output_dir", "generate")}
    paths = ("source", "validation")
    return {**sections, "data": {key: value for key, value in recipe["data"].items() if key not in paths}}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key.path=value` overrides (values are YAML), and check it: one line for a mistake."""
    path = Path(path)
    content = read_settings(path, overrides, what="recipe", starts_with="model")
    content.setdefault("name", path.stem)
    return check_recipe(content, path.name)


def check_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Check a recipe of this content; the line about a mistake begins with `where`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        # Keys are two deep; what pydantic adds below them names a branch of a union (`str`, `bool`).
        depth = 3 if error.errors()[0]["loc"][:1] == ("generate",) else 2
        raise UserError(f"{where}: {one_line(error, Recipe, depth=depth)}") from None


def recipe_schema() -> dict[str, Any]:
    """Make the JSON schema for editors, in which `method` has the settings of each method."""
    schema = Recipe.model_json_schema()
    schema["required"] = ["model", "data"]
    schema["properties"]["method"] = _method_schema()
    for name, units in (("tolerance", "(%|pt)"), ("changed", "%")):
        text = {"type": "string", "pattern": rf"^\d+(\.\d+)?{units}$"}
        schema["$defs"]["FitRequest"]["properties"][name]["anyOf"] = [text, {"type": "null"}]
    return schema


def _method_schema() -> dict[str, Any]:
    """Make the schema of a method: a bare name, or a name and the fields of its class."""
    forms: list[dict[str, Any]] = [{"enum": list(NAMES)}]
    for name in NAMES:
        settings: dict[str, Any] = {}
        if name in CLASSES:
            fields, docs = TypeAdapter(class_of(name)).json_schema()["properties"], field_docs(class_of(name))
            settings = {key: {**fields[key], "description": docs[key]} for key in setting_names(name)}
        properties = {"name": {"const": name}, **settings}
        forms.append({"type": "object", "properties": properties, "additionalProperties": False, "required": ["name"]})
    return {"anyOf": forms}

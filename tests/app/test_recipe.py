"""A recipe is read as written, and a mistake in it is one line that names the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pedyra.app.recipe import TRAINING_DEFAULTS, load_recipe, recipe_schema
from pedyra.app.recipe_sections import MethodSection
from pedyra.methods.names import NAMES, setting_names

RECIPE = """
model: {name: tiny-bert}
data: {source: toy}
lora: {r: 4}
training: {learning_rate: 1e-3, eval_strategy: no, max_steps: 7}
"""
FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_the_file_name_becomes_the_run_name_and_folder(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert (recipe.name, recipe.output_dir, recipe.method.name, recipe.seed) == ("mine", "runs/mine", "lora", 0)


def test_a_path_may_begin_at_home(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    recipe = load_recipe(recipe_file, ["output_dir='~/run'", "model.name='~/base'", "model.tokenizer='~/tokens'"])
    assert [Path(each) for each in (recipe.output_dir, recipe.model.name, recipe.model.tokenizer or "")] == [
        tmp_path / "run", tmp_path / "base", tmp_path / "tokens",
    ]  # fmt: skip


def test_numbers_and_words_are_read_as_yaml_1_2_does(recipe_file: Path):
    training = load_recipe(recipe_file, ["training.weight_decay=1E-2", "training.bf16=false"]).training
    assert training["learning_rate"] == 0.001  # YAML 1.1: the text "1e-3"
    assert training["eval_strategy"] == "no"  # YAML 1.1: false
    assert training["weight_decay"] == 0.01
    assert training["bf16"] is False


def test_training_starts_from_our_defaults(recipe_file: Path):
    training = load_recipe(recipe_file).training
    given = {"learning_rate": 0.001, "eval_strategy": "no", "max_steps": 7}
    assert training == {**TRAINING_DEFAULTS, **given}


def test_overrides_reach_any_depth_and_make_sections(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["lora.target_modules=[query, value]", "seed=3", "data.group_by=", "name=x=y"])
    assert recipe.lora.target_modules == ["query", "value"]
    assert recipe.lora.r == 4
    assert recipe.seed == 3
    assert recipe.data.group_by is None
    assert recipe.name == "x=y"


@pytest.mark.parametrize("text", ["mine", "5e-4", "12e5", "no", "1.5", "true", "null", "0x10", "a: b"])
def test_a_resolved_recipe_is_read_as_it_was_written(text: str, recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file).model_copy(update={"name": text})
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert "dropout: 0.0" in recipe.to_yaml()  # defaults are written out


# compare_*.yaml are grids of runs, of another schema; tests/experiments has them.
@pytest.mark.parametrize(
    "path",
    [path for path in sorted(FOLDER.glob("*.yaml")) if not path.name.startswith("compare_")],
    ids=lambda path: path.name,
)
def test_every_recipe_of_the_repository_is_valid(path: Path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("method", NAMES)
def test_a_method_is_a_name_or_a_name_with_settings(recipe_file: Path, method: str):
    assert load_recipe(recipe_file, [f"method={method}"]).method == MethodSection(name=method)
    key, value = {"seed": ("seed", 3), "r": ("r", 4), "ratio": ("ratio", 2)}.get(
        (setting_names(method) or [""])[-1], ("", 0)
    )
    if key:
        whole = load_recipe(recipe_file, [f"method={method}", f"method.{key}={value}"])
        assert (whole.method.name, whole.method.settings) == (method, {key: value})
        assert load_recipe(recipe_file, [f"method={{name: {method}, {key}: {value}}}"]).method == whole.method
    with pytest.raises(ValueError, match=f"method.bogus is no setting of method {re.escape(method)}; "):
        load_recipe(recipe_file, [f"method={method}", "method.bogus=5"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.sorce=x", "unknown key 'data.sorce'; did you mean 'data.source'?"),
        ("modl.name=x", "unknown key 'modl'; did you mean 'model'?"),
        ("lora.rank=3", "unknown key 'lora.rank'; did you mean 'lora.r'?"),
        ("lora.zzz=3", "unknown key 'lora.zzz'; known are r, alpha, dropout"),
        ("learning_rate=1e-3", "unknown key 'learning_rate'; did you mean 'training.learning_rate'?"),
        ("lora.lora_alpha=3", "unknown key 'lora.lora_alpha'; did you mean 'lora.alpha'?"),
        ("data.zzz=1", "unknown key 'data.zzz'; known are source, kind, config"),
        ("method=lorra", "method 'lorra' is unknown; did you mean 'lora'?"),
        (
            "method={name: pedyra, intervall: 2}",
            "method.intervall is no setting of method pedyra; did you mean 'interval'?",
        ),
        ("method={name: pedyra, interval: -1}", "method.interval is -1"),
        ("lora.r=0", "lora.r is 0: Input should be greater than or equal to 1"),
        ("lora.target_modules=3", "lora.target_modules is 3: Input should be a valid string or"),
        ("data.kind=foo", "data.kind is 'foo': Input should be 'classification'"),
        ("lora=4", "lora is 4: Input should be a valid dictionary"),
        ("data.kind=pairs", "name the second as data.text_pair"),
        ("data.kind=causal_lm", "takes one of prompt, template, messages; given: none"),
        ("data.metric=pearson", "data.metric pearson is no metric of data.kind classification; choose from accuracy"),
        ("training.seed=3", "training.seed is set by the recipe's top-level key 'seed'"),
        ("data={kind: pairs}", "key 'data.source' is required"),
        ("lora.r.x=3", "override 'lora.r.x=3': r is a value, not a section"),
        ("seed", "override 'seed' is not of the form key=value"),
        ("data.text=[", "override 'data.text=[' is not valid YAML"),
        ("lora.r=8.5", "lora.r is 8.5: Input should be a valid integer"),
        ("seed=1.5", "seed is 1.5"),
        ("training.resume_from_checkpoint=runs/a", "is not read; pedyra train --resume continues a run"),
        ("training.push_to_hub=true", "which pushes nothing"),
        ("training.hub_token=secret", "training.hub_token would be written into the run folder"),
        ("lora.init=lora_ga", "lora.init 'lora_ga' needs a pass over the data, which a recipe does not do"),
        (
            "lora.init=loftq",
            "lora.init: LoftQ (init_lora_weights) cannot be adapted: its factors belong to",
        ),
        ("lora.init=eva", "lora.init 'eva' needs a pass over the data, which a recipe does not do"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(recipe_file: Path, override: str, told: str):
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, [override])
    message = str(caught.value)
    assert told in message
    assert "\n" not in message


def test_several_mistakes_are_counted(recipe_file: Path):
    with pytest.raises(ValueError, match=r"seed is -1: .* \(and mistakes in 2 more keys\)"):
        load_recipe(recipe_file, ["data.a=1", "lora.b=1", "seed=-1"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("broken.yaml", "- a\n", "is no mapping"),
        ("broken.yaml", "a: b: c", "is not valid YAML"),
        ("absent.yaml", None, "does not exist"),
        ("", None, "is a folder; give the path of a YAML file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, name: str, text: str | None, told: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        load_recipe(tmp_path / name)


CAUSAL = "data.kind=causal_lm"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.messages=m", "data.completion=c"], "data.completion goes with data.prompt or data.template"),
        (["data.prompt=p", "data.template='{t}'", "data.completion=c"], "given: prompt and template"),
        (["data.template='Question:'", "data.completion=a"], "has no {column} place"),
        (["data.template='{q'", "data.completion=a"], "a brace itself is written twice"),
    ],
)
def test_causal_lm_wants_one_prompt_and_an_answer(recipe_file: Path, overrides: list[str], told: str):
    with pytest.raises(ValueError, match=re.escape(told)):
        load_recipe(recipe_file, [CAUSAL, *overrides])


def test_causal_lm_takes_chats_prompts_and_templates(recipe_file: Path):
    assert load_recipe(recipe_file, [CAUSAL, "data.messages=m"]).data.messages == "m"
    assert load_recipe(recipe_file, [CAUSAL, "data.prompt=p", "data.completion=c"]).data.completion == "c"
    template = load_recipe(recipe_file, [CAUSAL, "data.template='{{{q}}}'", "data.completion=c"]).data.template
    assert template == "{{{q}}}"


def test_the_schema_describes_every_key_and_forbids_others():
    schema = recipe_schema()
    assert schema["required"] == ["model", "data"]
    assert schema["additionalProperties"] is False
    sections = schema["$defs"]
    assert sections["LoraSection"]["properties"]["r"]["default"] == 8
    assert sections["DataSection"]["properties"]["group_by"]["description"].startswith("Column whose equal values")
    forms = {form["properties"]["name"]["const"]: form for form in schema["properties"]["method"]["anyOf"][1:]}
    assert tuple(forms) == NAMES and all(form["additionalProperties"] is False for form in forms.values())
    assert set(forms["pedyra"]["properties"]) == {"name", *setting_names("pedyra")}


def test_whole_numbers_may_be_written_as_floats(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["data.eval_rows=1e3", "lora.r=8.0", "lora.alpha=16.0", "lora.init=true"])
    assert (recipe.data.eval_rows, recipe.lora.r, recipe.lora.alpha, recipe.lora.init) == (1000, 8, 16.0, True)

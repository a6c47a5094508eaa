"""Code that a model's repository carries runs only where the command line says so: no file can, and nobody is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe_sections import ModelSection
from pedyra.export.export import export_adapter
from pedyra.lab.cli import main

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A model whose code leaves `ran` beside it; asking on stdin is an error."""

    def ask(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.delenv("PEDYRA_TRUST_REMOTE_CODE", raising=False)
    folder = tmp_path / "repository"
    plain = ModelSection(name="tiny-bert")
    tokenizer = load_tokenizer(plain)
    load_model(plain, "classification", 2, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return folder


def write_recipe(path: Path, **model: object) -> Path:
    training = {"max_steps": 4, "use_cpu": True}
    data = {"source": "toy", "train_rows": 32, "eval_rows": 8}
    content = {"model": model, "method": "lora", "data": data, "training": training, "output_dir": str(path / "run")}
    (path / "recipe.yaml").write_text(json.dumps(content))
    return path / "recipe.yaml"


def test_only_the_command_line_can(repository, tmp_path, capsys):
    recipe = str(write_recipe(tmp_path, name=str(repository)))
    for command in (["train", recipe, "--dry-run"], ["train", recipe]):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and "carries code of its own; if you trust its authors" in told
        assert "--trust-remote-code" in told and not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe, "--dry-run", "--trust-remote-code"])
    assert stopped.value.code in (0, None) and (tmp_path / "ran").exists()


def test_a_kernel_of_the_hub_is_code_too(repository):
    section = ModelSection(name=str(repository), attn_implementation="someone/attention")
    with pytest.raises(ValueError, match="someone/attention' is code on the Hub; if you trust its authors"):
        load_model(section, "classification", 2, load_tokenizer(ModelSection(name="tiny-bert")), 0)


def test_merging_an_adapter_runs_none_of_its_base(repository, tmp_path, make_bert):
    adapter = tmp_path / "adapter"
    make_bert().save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(repository)}))
    with pytest.raises(ValueError, match="carries code of its own; if you trust its authors"):
        export_adapter(adapter, "merged", tmp_path / "out")
    assert not (tmp_path / "ran").exists()

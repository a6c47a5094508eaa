"""training.push_to_hub: the adapter of a run and that of its fit are pushed, and a Hub that says no is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard

from pedyra.app.cli import app
from pedyra.app.recipe import Recipe


@pytest.fixture
def train(recipe: Any, tmp_path: Path):
    """train(**TrainingArguments, fit=...): `pedyra train` of the small recipe, as on the command line."""

    def run(fit: Any = None, **training: Any) -> Path:
        made: Recipe = recipe(data={"eval_rows": 48}, training={"push_to_hub": True, **training})
        content = {**made.model_dump(mode="json"), "fit": fit}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        app(["train", str(path)], standalone_mode=False)
        return Path(made.output_dir)

    return run


def test_a_run_pushes_its_adapter_and_not_its_folder(train: Any, monkeypatch: Any, capsys: Any):
    hub = HubStandIn().install(monkeypatch)
    run = train(hub_private_repo=True)
    assert hub.repositories == {"somebody/run": True}  # named after the output folder, as Trainer names it
    assert set(hub.tokens) == {None}  # that of the login
    assert hub.files == {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    assert "https://huggingface.co/somebody/run" in capsys.readouterr().out


def test_a_token_is_written_nowhere(train: Any):
    with pytest.raises(ValueError, match="training.hub_token would be written .*HF_TOKEN"):
        train(hub_token="secret")


def test_the_smaller_adapter_is_pushed_beside_it(train: Any, monkeypatch: Any):
    hub = HubStandIn().install(monkeypatch)
    run = train(fit={"parameters": 2000, "rows": 32}, hub_model_id="me/toy", per_device_eval_batch_size=2)
    assert hub.files["fit/adapter_model.safetensors"] == (run / "fit" / "adapter_model.safetensors").read_bytes()
    card = ModelCard(hub.files["fit/README.md"].decode())
    assert card.data.to_dict()["tags"] == ["pedyra", "lora"] and "proof" in card.text


def test_a_hub_that_says_no_is_told_before_the_training(train: Any, monkeypatch: Any, tmp_path: Path):
    HubStandIn(OSError("Token is required, but no token found")).install(monkeypatch)
    with pytest.raises(ValueError, match="hf auth login"):
        train()
    assert not (tmp_path / "run").exists()

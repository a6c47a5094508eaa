"""A trainer without a model: `python -m pedyra` in the test's folder runs it, and it does what the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pedyra.lab.compare.grid import Grid, load_grid

# The contract of `pedyra train`, and `training.fake` decides what becomes of a run:
# {method: value}, or {method: "crash" | "kill" | "wait"}. The value gets seed / 100 + learning_rate / 10 added.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
import yaml

recipe = yaml.safe_load(Path(sys.argv[2]).read_text())
run, flags = Path(recipe["output_dir"]), sys.argv[3:]
log = Path("calls.log").open("a")
print(recipe["method"]["name"], recipe["seed"], recipe["training"]["learning_rate"], *flags, file=log, flush=True)
if "--resume" in flags and not list(run.glob("checkpoint-*")):
    print("Error: no complete checkpoint", file=sys.stderr)
    sys.exit(2)
run.mkdir(parents=True, exist_ok=True)
(run / "recipe.yaml").write_text("x")
behaviour = recipe["training"]["fake"][recipe["method"]["name"]]
if "--resume" not in flags and behaviour in ("kill", "wait"):
    (run / "checkpoint-5").mkdir()
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    Path("waiting").write_text(str(os.getpid()))
    time.sleep(60)
if behaviour == "crash":
    print("Traceback ...\\nRuntimeError: out of luck")
    sys.exit(1)
value = (behaviour if isinstance(behaviour, float) else 0.5) + recipe["seed"] / 100
value += recipe["training"]["learning_rate"] / 10
row = {"step": 40, "final": True, "seconds": 2.0, "peak_memory_bytes": 1000, "trainable_parameters": 50,
       "metric": "accuracy", "value": value, "eval_loss": 1 - value, "metrics": {"accuracy": value, "f1": 0.1}}
(run / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
"""

GRID: dict[str, Any] = {
    "model": {"name": "tiny-bert"},
    "lora": {"r": 2, "alpha": 4},
    "training": {"max_steps": 40, "fake": {"lora": 0.5, "pedyra": 0.6, "dora": 0.4}},
    "methods": ["lora", "pedyra"],
    "tasks": {"toy": {"max_length": 48}},
    "seeds": [0, 1, 2],
    "learning_rates": [0.01, 0.1],
    "match": "rank",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the trainer in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pedyra.lab.compare.prepare.training_arguments", lambda recipe: None)  # `fake` is none
    monkeypatch.setattr(
        "pedyra.trainer.checkpoint_folder.find_flaw", lambda checkpoint, with_ranks: None
    )  # an empty one
    (tmp_path / "pedyra").mkdir()
    (tmp_path / "pedyra" / "__init__.py").touch()
    (tmp_path / "pedyra" / "__main__.py").write_text(TRAINER)
    return tmp_path


@pytest.fixture
def make_grid(folder: Path) -> Callable[..., Grid]:
    """make_grid(*overrides, **keys): lora and pedyra on toy sentences, three seeds, two rates, equal ranks."""

    def make(*overrides: str, **keys: Any) -> Grid:
        path = folder / "grid.yaml"
        path.write_text(yaml.safe_dump({**GRID, **keys}))
        return load_grid(path, overrides)

    return make


@pytest.fixture
def calls(folder: Path) -> Callable[[], list[str]]:
    """calls(): every start of the trainer so far, as "method seed rate flags"."""

    def read() -> list[str]:
        log = folder / "calls.log"
        return log.read_text().splitlines() if log.is_file() else []

    return read

"""`pedyra train` under accelerate's FSDP2 comes to what one process does, in any number of processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from fsdp2 import cut_on_cpu
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from test_processes import RECIPE
from together import can_fork, together
from torch.distributed.tensor import DTensor
from works_with import note

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.runs.callbacks import MetricsLog
from pedyra.lab.cli import main
from pedyra.lora.files import read_json, read_rows

pytestmark = [
    pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator"),
    pytest.mark.skipif(
        Version(accelerate.__version__) < Version("1.11"), reason="accelerate cuts what it is told to leave whole"
    ),
]

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
LAUNCH = {
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    **{"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
}
"""`accelerate launch --use_fsdp --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false` gives its processes these."""


def train(folder: Path, size: int, *flags: str, launch: dict[str, str] | None = None, **changes: Any) -> list[int]:
    """`pedyra train` in so many processes, which share the eight rows of a step: their exit codes."""
    folder.mkdir(exist_ok=True)
    training = {**RECIPE["training"], "per_device_train_batch_size": 8 // size, **changes.pop("training", {})}
    recipe = {**RECIPE, "output_dir": str(folder / "run"), "training": training, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return together(_train, size, folder, flags, launch or {})


def _train(rank: int, size: int, folder: Path, flags: tuple[str, ...], launch: dict[str, str]) -> int:
    os.environ.update(launch)
    cut_on_cpu()
    if size > 1:
        MetricsLog.on_step_end = _base_is_cut
    return run(folder / f"log{rank}", [str(folder / "recipe.yaml"), *flags])


def _base_is_cut(self: Any, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor) != parameter.requires_grad
    self._last_step = state.global_step


def run(log: Path, arguments: list[str]) -> int:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    return int(ended.value.code or 0)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log*")))


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same losses and ranks at the same steps, and the same adapter, to what float32 rounds otherwise."""
    rows, others = (read_rows(folder / "run" / "metrics.jsonl") for folder in (ours, theirs))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for key in {"loss", "eval_loss", "value", "trainable_parameters", "total_parameters"} & other.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    ranks, other_ranks = (
        [row["ranks"] for row in read_rows(folder / "run" / "ranks.jsonl") if row["kind"] == "adjustment"]
        for folder in (ours, theirs)
    )
    assert ranks == other_ranks
    tensors, other_tensors = (load_file(adapter(folder) / "adapter_model.safetensors") for folder in (ours, theirs))
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in other_tensors.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


def adapter(folder: Path) -> Path:
    return folder / "run" / "adapter"


def begin_after_step_4(finished: Path, folder: Path) -> None:
    """The run as a kill after the checkpoint of step 4 leaves it."""
    shutil.copytree(finished, folder)
    recipe = (folder / "run" / "recipe.yaml").read_text()
    (folder / "run" / "recipe.yaml").write_text(recipe.replace(str(finished), str(folder)))
    shutil.rmtree(folder / "run" / "checkpoint-8")
    shutil.rmtree(adapter(folder))
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["step"] <= 4]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("method", "launch", "others"),
    [("lora+", LAUNCH, 1), ("pedyra", None, 4)],
    ids=["ranks stay, with an optimizer of its own", "ranks move"],
)
def test_two_processes_train_as_one_and_resume_in_another_number(method, launch, others, tmp_path: Path):
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    settings: dict[str, Any] = {"method": method, "training": {} if launch else FSDP2}
    assert train(one, 1, **settings) == [0], logs(one)
    assert ("FSDP is left out in one process" in logs(one)) == (launch is None)
    assert train(two, 2, launch=launch, **settings) == [0, 0], logs(two)
    assert_same_run(two, one)
    assert read_json(two / "run" / "environment.json")["fsdp2"] is True
    assert (two / "run" / "report.html").is_file()
    section = ModelSection(name="tiny-llama")
    base = load_model(section, "causal_lm", None, load_tokenizer(section), 0)
    PeftModel.from_pretrained(base, adapter(two))  # warns of weights that are not there
    begin_after_step_4(two, resumed)
    assert train(resumed, others, "--resume", **settings) == [0] * others, logs(resumed)
    assert "checkpoint-4" in logs(resumed)
    assert_same_run(resumed, two)
    assert read_json(resumed / "run" / "environment.json")["fsdp2"] is (others > 1)
    if method == "pedyra":
        found = {"ranks": "move", "resume": "the same to 1e-5, in four processes"}
        note("engine", "FSDP2 in `pedyra train`, two processes", **found, fit="refused: run `pedyra fit FOLDER`")


CASES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "empty weights": (
        {"training": {}},
        {**LAUNCH, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
        "cpu_ram_efficient_loading, which cuts the adapter too; set it to false",
    ),
    "checkpointing": (
        {"training": {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}},
        {},
        "activation_checkpointing in fsdp_config, whose names PEFT does not save; set gradient_checkpointing",
    ),
    "fit": ({"training": FSDP2, "fit": {}}, {}, "fit runs in one process; remove the section, and run: pedyra fit "),
    "compile": ({"training": {**FSDP2, "torch_compile": True}}, {}, "FSDP2 with torch_compile; leave it out"),
}
"""Case -> changes of the recipe, the launcher's environment, what is told."""


def told(rank: int, size: int, folder: Path) -> dict[str, tuple[int, str]]:
    cut_on_cpu()

    found = {}
    for number, (case, (_, launch, _)) in enumerate(CASES.items()):
        log, recipe = folder / f"log{rank}", folder / f"{number}.yaml"
        if number:  # the first waits for the others as it sets torch.distributed up
            torch.distributed.barrier()
        os.environ.update(launch)
        found[case] = (run(log, [str(recipe)]), log.read_text())
        for name in launch:
            del os.environ[name]
    return found


def test_what_cannot_be_done_is_told_in_one_line_before_training(tmp_path: Path):
    for number, (changes, _, _) in enumerate(CASES.values()):
        training = {**RECIPE["training"], **changes.get("training", {})}
        content = {**RECIPE, **changes, "training": training, "output_dir": str(tmp_path / "run")}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(content))
    for found in together(told, 2, tmp_path):
        for case, (_, _, line) in CASES.items():
            code, log = found[case]
            assert code == 2 and line in log and log.count("Error:") == 1 and "Traceback" not in log, (case, log)
    assert not (tmp_path / "run").exists()

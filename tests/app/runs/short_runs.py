"""A run of seconds, and what to compare of its folder."""

from io import StringIO
from typing import Any

from closeness import same_bits
from rich.console import Console
from safetensors.torch import load_file

from pedyra.app.runs.run import train_run
from pedyra.lora.files import read_rows
from pedyra.methods.names import setting_names

RECIPE = {
    "name": "toy",
    "method": "lora",
    "model": {"name": "tiny-bert"},
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 16},
    "lora": {"r": 4, "alpha": 8},
    "training": {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "use_cpu": True,
    },
}
# Of method pedyra, whose triples move whether or not it helps.
RANK = {
    **{"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3},
    **{"min_rank": 1, "start": "lora", "orth_weight": 0.0, "budget": "parameters"},
}


def named(method: str, **settings: Any) -> dict[str, Any]:
    """The section `method`, with those of `RANK` that the method has."""
    known = setting_names(method)
    return {"name": method, **{key: value for key, value in RANK.items() if key in known}, **settings}


def run(recipe, **flags) -> Any:
    return train_run(recipe, console=Console(file=StringIO()), **flags)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert all(same_bits(left[name], right[name]) for name in left)


def steps_of(folder, kind):
    """The adjustments or evaluations that a folder tells, without their times."""
    if kind == "adjustment":
        rows = [row for row in read_rows(folder / "ranks.jsonl") if row["kind"] == kind]
    else:
        rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval_loss" in row and "final" not in row]
    return [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]

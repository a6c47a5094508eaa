"""SIGKILL at random moments of a training, resumed every time: does it end equal to the unbroken one, bit for bit?

    python tests/soak/kills.py --kills 300

trains a tiny classifier, with a save after every step and triples that move, through `pedyra train` (and `--resume`)
and through a script of one's own (`Trainer`, `adapt`, `resume_from_checkpoint=True`), by turns. Each attempt is
a process of its own, killed after a random part of the processor time that an unbroken training takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pedyra import PeDyra, adapt
from pedyra.app.runs import run as _  # noqa: F401 (loaded once, before the forks)
from pedyra.lab.cli import main as pedyra

SCHEDULE: dict[str, Any] = {"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3}
RECIPE: dict[str, Any] = {
    "method": {"name": "pedyra", **SCHEDULE, "start": "lora"},
    "model": {"name": "tiny-bert"},
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 16},
    "lora": {"r": 4, "alpha": 8},
    "training": {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
    },
}


def by_command(folder: Path, limit: int) -> None:
    """`pedyra train`, gone on with as its own messages say."""
    recipe = folder / "recipe.yaml"
    training = {**RECIPE["training"], "save_total_limit": limit}
    recipe.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run"), "training": training}))
    begun = (folder / "run" / "recipe.yaml").exists()
    saved = begun and get_last_checkpoint(str(folder / "run")) is not None
    with contextlib.suppress(SystemExit):
        pedyra(["train", str(recipe), *(["--resume"] if saved else ["--overwrite"] if begun else [])])
    assert (folder / "run" / "adapter").is_dir()


def by_script(folder: Path, limit: int) -> None:
    """A user's own Trainer; only the callback is pedyra's."""
    if (folder / "run" / "adapter").is_dir():
        return  # the kill came after the end
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    lora = LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value", "dense"])
    ids = torch.randint(3, 40, (32, 6))
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=limit,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=get_peft_model(base, lora),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": int(row[0] > 20)} for row in ids],  # type: ignore[arg-type]
    )
    adapt(trainer, PeDyra.as_published(**SCHEDULE), record_to=folder / "run" / "ranks.jsonl")
    started = (folder / "run").is_dir() and get_last_checkpoint(str(folder / "run")) is not None
    trainer.train(resume_from_checkpoint=started)
    trainer.model.save_pretrained(str(folder / "run" / "adapter.part"))  # type: ignore[union-attr]
    (folder / "run" / "adapter.part").rename(folder / "run" / "adapter")


def attempt(act: Callable[[], None], seconds: float, log: Path) -> float | None:
    """Run `act` in a process, and kill that after `seconds` of processor time; those it took, None if it was killed.

    RuntimeError where it failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads; none of them is used
        child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                act()
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    clock = psutil.Process(child)
    while (left := seconds - sum(clock.cpu_times()[:2])) > 0:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"the training failed:\n{log.read_text()[-3000:]}")
            return used.ru_utime + used.ru_stime
        time.sleep(min(max(left, 0.002), 0.05))  # one thread takes no more of its time than passes
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights of the saved adapter, and every adjustment without its time."""
    rows = [json.loads(line) for line in (folder / "run" / "ranks.jsonl").read_text().splitlines()]
    moved = [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] == "adjustment"]
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors"), moved


Way = tuple[Callable[[Path, int], None], int]
WAYS: list[Way] = [(act, limit) for act in (by_command, by_script) for limit in (1, 2)]
"""What trains into a folder, and its save_total_limit."""


def soak(
    kills: int, seed: int, folder: Path, *, ways: Sequence[Way] = WAYS, told: Callable[[str], None] = print
) -> dict[str, int]:
    """Kill and resume until `kills` were made; {"kills", "trainings", "equal"}.

    Raises:
        RuntimeError: a training could not go on; the message has what it said.
    """
    chance, done, trainings, equal = random.Random(seed), 0, 0, 0
    whole, seconds = {}, {}
    while done < kills:
        act, limit = ways[trainings % len(ways)]
        if act not in whole:
            place = folder / act.__name__
            place.mkdir()
            seconds[act] = attempt(functools.partial(act, place, 2), math.inf, folder / "log")
            whole[act] = outcome(place)
        place = folder / "killed"
        place.mkdir()
        train = functools.partial(act, place, limit)
        while attempt(train, chance.uniform(0, seconds[act]) if done < kills else math.inf, folder / "log") is None:
            done += 1
        weights, moved = outcome(place)
        same = weights.keys() == whole[act][0].keys() and moved == whole[act][1]
        equal += same and all(torch.equal(value, whole[act][0][name]) for name, value in weights.items())
        trainings += 1
        shutil.rmtree(place)
        told(f"{done} kills, {equal} of {trainings} trainings equal to the unbroken one")
    return {"kills": done, "trainings": trainings, "equal": equal}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = soak(given.kills, given.seed, Path(scratch))
    sys.exit(result["equal"] != result["trainings"])

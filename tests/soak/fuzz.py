"""Mutated inputs of every kind that pedyra reads: each is taken, or refused in one short line; never a traceback.

    python tests/soak/fuzz.py --inputs 20000 --seed 0

A finished run, an interrupted one, an adapter, a checkpoint, a recipe and a grid are made once. Then, again and again,
one file is spoiled (bits, bytes, lines, values, keys; half of the checkpoints get fitting digests again) and a command
reads it, in this process. Counted as failures: any exit code but 0 and 2, an exception, more than ten seconds of
processor time, a message over 300 letters, unpickled code, a shell, a connection.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a spoilt name of a model is looked for here alone
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
import yaml
from peft import LoraConfig, get_peft_model
from spoiling import spoil

from pedyra import PeDyra, RankAllocator
from pedyra.allocate.checkpoint import restore
from pedyra.app.recipe import load_recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.errors import UserError
from pedyra.lab.cli import main as pedyra
from pedyra.lab.compare.grid import load_grid
from pedyra.lora.files import SUMS, write_sums
from pedyra.trainer.checkpoint_folder import check_loaded

SECONDS, LONGEST = 10, 300 + len("Error: ")
RECIPE: dict[str, Any] = {
    "method": "pedyra",
    "model": {"name": "tiny-bert"},
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 32},
    "lora": {"r": 4, "alpha": 8, "target_modules": ["query", "value"]},
    "rank": {"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3, "start": "lora"},
    "training": {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 4, "save_strategy": "steps"},
}
GRID: dict[str, Any] = {
    "methods": {"lora": {}, "pedyra": {"learning_rates": [1e-3]}},
    "tasks": {"toy": {"source": "toy", "train_rows": 32, "eval_rows": 8}},
    "seeds": [0, 1],
    "learning_rates": [1e-3, 3e-3],
    "model": {"name": "tiny-bert"},
    "lora": {"r": 2},
    "training": {"max_steps": 4},
}
Read = Callable[[Path], Any]


class Fuzz:
    """The inputs, what reads them, and what went wrong."""

    def __init__(self, folder: Path, seed: int, wanted: Callable[[str, float], bool]) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.events: list[str] = []
        self._make()
        self.tasks: dict[str, tuple[str, str, Read, float]] = {
            # name: (folder, files, what reads it, how often)
            "inspect": ("run", "adapter/*", lambda p: self.command("inspect", p), 3),
            "export": ("run", "adapter/*", self._export, 4),
            "merged": ("run", "[ar]*/*", lambda p: self.command("export", p, "--target", "merged"), 0.3),
            "fit": ("run", "adapter/*", lambda p: self.command("fit", p, "--rank", "1"), 0.3),
            "report": ("run", "*.*", lambda p: self.command("report", p), 2),
            "eval": ("run", "*.*", lambda p: self.command("eval", p), 0.2),
            "eval adapter": ("run", "adapter/*", lambda p: self.command("eval", p), 0.2),
            "resume": ("broken", "*.*", self._resume, 0.3),
            "resume checkpoint": ("broken", "checkpoint-8/*", self._resume, 0.2),
            "side files": ("broken", "checkpoint-8/*", self._restore, 6),
            "recipe": ("recipe", "*.yaml", self._recipe, 10),
            "dry run": ("recipe", "*.yaml", lambda p: self.command("train", p / "recipe.yaml", "--dry-run"), 0.3),
            "grid": ("grid", "*.yaml", lambda p: load_grid(p / "grid.yaml", []), 6),
        }
        self.tasks = {name: task for name, task in self.tasks.items() if wanted(name, task[3])}
        for source, _, read, _ in self.tasks.values():  # what is whole is read
            shutil.copytree(self.folder / source, self.folder / "input")
            read(self.folder / "input")
            shutil.rmtree(self.folder / "input")
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("pickle.find_class", "os.system", "os.exec", "socket.connect"):
            self.events.append(event)

    def _make(self) -> None:
        os.chdir(self.folder)
        for name in ("recipe", "grid"):
            (self.folder / name).mkdir()
        (self.folder / "recipe" / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": "nowhere"}))
        (self.folder / "grid" / "grid.yaml").write_text(yaml.safe_dump({**GRID, "output_dir": "comparison"}))
        self.command("train", "recipe/recipe.yaml", "output_dir=run")
        shutil.copytree("run", "broken")
        shutil.rmtree("broken/adapter")
        rows = Path("broken/metrics.jsonl").read_text().splitlines(keepends=True)
        Path("broken/metrics.jsonl").write_text("".join(rows[:-1]))
        text = Path("broken/recipe.yaml").read_text().replace("output_dir: run", "output_dir: input")
        Path("broken/recipe.yaml").write_text(text)
        shutil.copy("broken/recipe.yaml", "resumed.yaml")

    def command(self, *arguments: object) -> None:
        """Raises AssertionError for a wrong exit or a message that is too long."""
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            try:
                pedyra([str(each) for each in arguments])
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
        assert code in (0, 2), f"exit code {code}"
        if code == 2:
            message = told.getvalue().strip().splitlines()[-1]
            assert message.startswith("Error: "), f"no message but {message[:200]!r}"
            assert len(message) <= LONGEST, f"a message of {len(message)} letters"
            raise UserError(message)

    def _export(self, run: Path) -> None:
        target = self.chance.choice(["peft", "padded"])
        self.command("export", run / self.chance.choice(["", "adapter"]), "--target", target, "--out", run / "out")

    def _resume(self, run: Path) -> None:
        self.command("train", self.folder / "resumed.yaml", "--resume", "--dry-run")

    def _restore(self, run: Path) -> None:
        from pedyra.app.models.base import load_model, load_tokenizer
        from pedyra.app.recipe_sections import ModelSection

        folder = run / "checkpoint-8"
        if self.chance.random() < 0.7:  # as somebody would who wants it to pass
            write_sums(folder, [path.name for path in folder.iterdir() if path.name != SUMS])
        section = ModelSection(name="tiny-bert")
        base = load_model(section, "classification", 2, load_tokenizer(section), 0)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(base, lora)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        allocator = RankAllocator(model, optimizer, PeDyra(**RECIPE["rank"]), 12)
        try:
            check_loaded(folder)
            restore(allocator, folder)
        finally:
            allocator.release()

    def _recipe(self, folder: Path) -> None:
        training_arguments(load_recipe(folder / "recipe.yaml"))

    def one(self) -> None:
        """Spoil one file of one input, and have it read."""
        name = self.chance.choices(list(self.tasks), [task[3] for task in self.tasks.values()])[0]
        source, pattern, read, _ = self.tasks[name]
        place = self.folder / "input"
        shutil.copytree(self.folder / source, place)
        files = [path for path in sorted(place.glob(pattern)) if path.is_file() and path.suffix != ".html"]
        spoilt = self.chance.choice(files)
        spoil(spoilt, self.chance)
        self.counts[name] += 1
        self.events.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(place)
        except UserError:
            self.counts["refused"] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._failed(name, spoilt, error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self.events:
            self._failed(name, spoilt, RuntimeError(f"it came to {sorted(set(self.events))}"))
        shutil.rmtree(place)

    def _failed(self, name: str, spoilt: Path, error: BaseException) -> None:
        places = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/pedyra/" in f.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else places[-1]
        key = f"{name}, {spoilt.name}: {type(error).__name__} at {at}"
        self.failures[key] += 1
        self.examples.setdefault(key, f"{str(error)[:200]} ({' '.join(places[-4:])})")


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def fuzz(
    inputs: int,
    seed: int,
    folder: Path,
    *,
    wanted: Callable[[str, float], bool] = lambda name, often: True,
    told: Callable[[str], None] = print,
) -> Fuzz:
    """Try so many inputs of the kinds that are `wanted`, by name and by how often they are tried beside the others."""
    before = signal.signal(signal.SIGPROF, _too_long)
    found = Fuzz(folder, seed, wanted)
    for number in range(1, inputs + 1):
        found.one()
        if number % 500 == 0:
            told(f"{number} inputs: {dict(found.counts)}, {sum(found.failures.values())} failures")
    signal.signal(signal.SIGPROF, before)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="e.g. report, export, side files, recipe, grid")
    parser.add_argument("--quick", action="store_true", help="without those that load a model to train or to judge it")
    given = parser.parse_args()
    torch.set_num_threads(1)

    def is_wanted(name: str, often: float) -> bool:
        return name.startswith(given.only) and (often >= 1 or not given.quick)

    with tempfile.TemporaryDirectory() as scratch:
        result = fuzz(given.inputs, given.seed, Path(scratch), wanted=is_wanted)
        os.chdir("/")
    print(dict(result.counts))
    for key, count in result.failures.most_common():
        print(f"{count:6}  {key}\n        {result.examples[key]}")
    sys.exit(bool(result.failures))

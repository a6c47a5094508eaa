"""The run folder: whether a run may write there, and files that are whole or absent, never half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a run writes, and so all that `--overwrite` may remove. "runs" is where Trainer puts TensorBoard's files.
CONTENTS = (
    "recipe.yaml",
    "metrics.jsonl",
    "ranks.jsonl",
    "environment.json",
    "report.html",
    "adapter",
    "export",
    "figures",
    "runs",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder, and the rules of writing into it."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.jsonl"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def holds_run(self) -> bool:
        """Whether a run was started here; the resolved recipe is the first thing a run writes."""
        return self.recipe.is_file()

    def is_finished(self) -> bool:
        """Whether the run here wrote its last line of metrics, which it does after saving the adapter."""
        rows = read_rows(self.metrics)
        return bool(rows) and bool(rows[-1].get("final"))

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse to start where this run must not write. Changes nothing.

        Raises:
            ValueError: another run or foreign files are here, nothing can be resumed, or both flags are set.
        """
        if overwrite and resume:
            raise ValueError("--overwrite and --resume exclude each other; give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file; choose a folder")
        if resume:
            if not self.holds_run():
                raise ValueError(f"{self.path} holds no run to resume; train without --resume")
            if self.is_finished():
                raise ValueError(f"the run in {self.path} is finished; --overwrite starts it anew")
        elif self.holds_run():
            if not overwrite:
                raise ValueError(
                    f"{self.path} holds another run; continue it with --resume, replace it with --overwrite, "
                    "or choose another output_dir"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no run of pedyra; choose another output_dir (its files are kept)"
            )
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            raise ValueError(f"output_dir {self.path} cannot be written: no permission in {parent}")

    def clear(self) -> None:
        """Remove the run that is here; files that no run writes stay."""
        # The recipe goes last: until then the folder still counts as a run, and can be overwritten again.
        entries = [self.path / name for name in CONTENTS if name != "recipe.yaml"]
        for entry in [*entries, *self.path.glob("checkpoint-*"), *self.path.glob(".*.part"), self.recipe]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write `path` whole or not at all: temporary name, fsync, rename."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_folder(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a folder that appears as `path` whole or not at all; an older one is replaced."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save(part)
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if it is absent; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]

"""The folder of a run: its files, and whether a run may write there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pedyra.errors import UserError
from pedyra.lora.files import read_json, read_rows, refuse_link, refuse_unwritable, remove, write_file
from pedyra.trainer.checkpoint_folder import ASIDE, list_checkpoints

# The entries that a run writes, and that `--overwrite` may remove. "runs" has Trainer's TensorBoard files.
CONTENTS = (
    *("recipe.yaml", "metrics.jsonl", "ranks.jsonl", "environment.json", "samples.jsonl", "evaluation.json"),
    *("report.html", "adapter", "fit", "export", "figures", "runs", ASIDE),
)

logger = logging.getLogger(__name__)

LOCK = ".lock"  # the training process holds the lock of this file


def run_of(path: Path) -> Path | None:
    """Return `path` if it is a run folder, or the run folder of this adapter, fit or checkpoint; None for others."""
    place = path.resolve()
    of_run = place.name in ("adapter", "fit") or place.name.startswith("checkpoint-")
    for folder in (path, *((place.parent,) if of_run else ())):
        if (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


class RunFolder:
    """The paths inside a run folder, and the checks before a run writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.ranks = path / "ranks.jsonl"
        self.samples = path / "samples.jsonl"
        self.environment = path / "environment.json"
        self.adapter = path / "adapter"

    def recorded(self, key: str) -> Any:
        """Read a field of environment.json; None where there is none."""
        return read_json(self.environment).get(key) if self.environment.is_file() else None

    def holds_run(self) -> bool:
        return self.recipe.is_file() and self.environment.is_file()

    @property
    def final(self) -> dict[str, Any] | None:
        """The last line of metrics, which a run writes after it has saved the adapter; None before."""
        rows = read_rows(self.metrics, {"step": int})
        return rows[-1] if rows and rows[-1].get("final") else None

    def result(self) -> dict[str, Any]:
        """Return `final`, or refuse a run that is not finished."""
        if self.final is None:
            raise UserError(f"{self.path} holds no finished run; give the output_dir of one, or train it first")
        return self.final

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse to start where this run must not write; change nothing."""
        if overwrite and resume:
            raise UserError("--overwrite and --resume exclude each other; give one of them")
        if self.path.is_file():
            raise UserError(f"output_dir {self.path} is a file; choose a folder")
        # Through a link in a folder of somebody else a run would write, move or remove files outside of it.
        for entry in sorted(self.path.glob("*")):
            refuse_link(entry)
        if resume:
            if not self.holds_run():
                raise UserError(f"{self.path} holds no run to resume; train without --resume")
            if self.final is not None:
                raise UserError(f"the run in {self.path} is finished; --overwrite starts it anew")
        elif self.holds_run():
            if not overwrite:
                raise UserError(
                    f"{self.path} holds another run; continue it with --resume, replace it with --overwrite, "
                    "or choose another output_dir"
                )
        elif any(entry.name not in (LOCK, self.environment.name) for entry in self.path.glob("*")):
            raise UserError(
                f"{self.path} is not empty and holds no run of pedyra; choose another output_dir (its files are kept)"
            )
        refuse_unwritable(self.path, f"output_dir {self.path}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other processes. It is created if it does not exist, and removed again if it stays
        empty. `check` comes first, so that no entry is a link."""
        new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process trains into {self.path} now; wait for it, or choose another output_dir"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): no other process may train there now", self.path, error)
        try:
            yield
        finally:
            with suppress(OSError):  # where a file that is open cannot be removed, it stays
                (self.path / LOCK).unlink()
            lock.release()
            with suppress(OSError):  # they are not empty
                for folder in new_folders:
                    folder.rmdir()

    def begin(self, recipe: str) -> None:
        """Remove the earlier run, and write the recipe of the new one; `remove_empty_run` follows in any case."""
        for entry in self._entries():
            if entry not in (self.recipe, self.environment):  # after a kill, these two mark a run that may be replaced
                remove(entry)
        write_file(self.environment, "{}\n")  # until the device is known
        write_file(self.recipe, recipe)

    def remove_empty_run(self) -> None:
        """Remove a run that has logged and saved nothing, so that the folder is free again."""
        has_logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        if not has_logged and not list_checkpoints(self.path):
            for entry in self._entries():
                remove(entry)

    def _entries(self) -> list[Path]:
        paths = [self.path / name for name in CONTENTS]
        paths += [*self.path.glob("checkpoint-*"), *self.path.glob(".*.part")]
        return [entry for entry in paths if entry.exists() or entry.is_symlink()]

"""Neither a run that is there nor a whole checkpoint is lost: to a mistake, another process, a full disk."""

import errno
from pathlib import Path

import pytest
import torch
from short_runs import adapter, assert_same_tensors, run

from pedyra.app.recipe import load_recipe
from pedyra.app.runs.run_folder import RunFolder


def test_a_mistake_in_the_new_recipe_leaves_the_old_run_alone(recipe):
    folder = run(recipe()).folder.path
    before = adapter(folder)
    with pytest.raises(ValueError, match="matches no module"):
        run(recipe(lora={"target_modules": ["quary"]}), overwrite=True)
    assert_same_tensors(adapter(folder), before)
    assert run(recipe(seed=1), overwrite=True).final is not None
    assert load_recipe(folder / "recipe.yaml").seed == 1


def fill_disk(monkeypatch, *, after):
    """torch.save writes half of an optimizer state and fails, once `after` were written."""
    original, written = torch.save, []

    def save(value, path, *args, **kwargs):
        original(value, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            written.append(path)
            if len(written) > after:
                with open(path, "r+b") as file:
                    file.truncate(100)
                monkeypatch.setattr(torch, "save", original)
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:672] . unexpected pos 17348 vs 17232"
                )  # as seen

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(recipe, monkeypatch, method):
    whole = run(recipe(method, output="whole"))
    fill_disk(monkeypatch, after=1)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        run(recipe(method))
    resumed = run(recipe(method), resume=True)
    assert_same_tensors(adapter(resumed.folder.path), adapter(whole.folder.path))


def test_two_processes_do_not_train_into_one_folder(recipe):
    with RunFolder(Path(recipe().output_dir)).lock():
        with pytest.raises(ValueError, match="another process trains into .* now; wait for it, or choose another"):
            run(recipe())
    assert run(recipe()).step == 12  # what is left of a lock is no foreign file
    assert not (Path(recipe().output_dir) / ".lock").exists()


def test_where_nothing_can_be_locked_a_run_goes_on(recipe, monkeypatch, caplog):
    def acquire(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert run(recipe()).step == 12
    assert "cannot be locked" in caplog.text

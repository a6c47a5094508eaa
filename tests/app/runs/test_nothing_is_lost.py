"""Neither a run that is there nor a whole checkpoint is lost: to another run, a full disk, a kill."""

import errno
from pathlib import Path

import pytest
import torch
from peft import PeftModel
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


def test_a_second_run_is_refused(recipe):
    run(recipe())
    with pytest.raises(ValueError, match="holds another run"):
        run(recipe())


def test_a_run_that_is_replaced_comes_back_if_the_new_one_takes_no_step(recipe, monkeypatch):
    folder = run(recipe()).folder.path
    before = adapter(folder)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "notes.txt").write_text("mine")

    def fail(*args, **kwargs):
        raise RuntimeError("no step")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=1), overwrite=True)
    assert_same_tensors(adapter(folder), before)
    assert (folder / "metrics.jsonl").read_text() == metrics and (folder / "checkpoint-12").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        patched.setattr(RunFolder, "withdraw", lambda self, **_: False)  # as if killed then: nothing is put back
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=1), overwrite=True)
        assert not (folder / "adapter").exists()
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.training_step", fail)
        with pytest.raises(RuntimeError, match="no step"):
            run(recipe(seed=2), overwrite=True)
    assert_same_tensors(adapter(folder), before)  # not lost for the one that was killed
    run(recipe(seed=1), overwrite=True)
    assert not (folder / ".replaced").exists() and (folder / "notes.txt").read_text() == "mine"
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


def test_a_full_disk_keeps_checkpoints_that_were_never_meant_to_be_resumed(recipe, monkeypatch):
    save_pretrained = PeftModel.save_pretrained

    def fail(self, folder, **kwargs):
        if "checkpoint" not in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_pretrained(self, folder, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="checkpoint-12 holds the adapter, but not what a resume needs"):
        run(recipe(training={"save_only_model": True}))
    kept = Path(recipe().output_dir)
    assert {path.name for path in kept.glob("checkpoint-*")} == {
        "checkpoint-8",
        "checkpoint-12",
    }


def test_a_full_disk_before_the_first_step_keeps_the_run_that_was_there(recipe, monkeypatch):
    folder = run(recipe()).folder.path

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.Trainer.training_step", fail)
    with pytest.raises(OSError, match="before the first step; the run that was there is kept$"):
        run(recipe(seed=1), overwrite=True)
    assert (folder / "adapter").is_dir() and load_recipe(folder / "recipe.yaml").seed == 0


@pytest.mark.parametrize("method", ["lora", "pedyra"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(recipe, monkeypatch, method):
    whole = run(recipe(method, output="whole"))
    fill_disk(monkeypatch, after=1)
    with pytest.raises(OSError, match="disk full.*checkpoint-4 is whole.*--resume") as error:
        run(recipe(method))
    assert error.value.errno == errno.ENOSPC
    resumed = run(recipe(method), resume=True)
    assert_same_tensors(adapter(resumed.folder.path), adapter(whole.folder.path))


def test_two_processes_do_not_train_into_one_folder(recipe):
    with RunFolder(Path(recipe().output_dir)).held():
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


def test_a_run_is_not_lost_to_one_whose_recipe_cannot_be_written(recipe, monkeypatch):
    folder = run(recipe()).folder
    before = adapter(folder.path)

    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pedyra.app.runs.run.write_file", fail)
        with pytest.raises(OSError, match="disk full"):
            run(recipe(seed=1), overwrite=True)
    assert_same_tensors(adapter(folder.path), before)
    assert load_recipe(folder.recipe).seed == 0 and folder.is_finished()


def test_a_run_that_was_half_put_aside_by_a_kill_is_whole_again(recipe, monkeypatch):
    folder = run(recipe()).folder
    before = adapter(folder.path)
    rename = Path.rename

    def killed(self, target):
        if self.name == "checkpoint-12":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.begin("name: new\n")
    assert folder.holds_run() and not (folder.path / "adapter").exists()
    with pytest.raises(ValueError, match="the run in .* is finished"):
        run(recipe(), resume=True)
    assert_same_tensors(adapter(folder.path), before)
    assert (folder.path / "checkpoint-12").is_dir() and not (folder.path / ".replaced").exists()

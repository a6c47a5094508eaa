"""The run folder's rules: nobody's files are lost, and nothing in it is half-written."""

import json
import shutil
from pathlib import Path

import pytest

from pedyra.app.runs.run_folder import RunFolder
from pedyra.lora.files import append_row, read_rows, write_file, write_folder


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_file(folder.recipe, "name: first\n")
    return folder


def test_a_new_or_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path / "new" / "deep").check(overwrite=False, resume=False)
    RunFolder(tmp_path).check(overwrite=False, resume=False)


def test_checking_creates_nothing(tmp_path):
    RunFolder(tmp_path / "new").check(overwrite=True, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_with_both_ways_out(run):
    with pytest.raises(ValueError, match="holds another run.*--resume.*--overwrite"):
        run.check(overwrite=False, resume=False)
    run.check(overwrite=True, resume=False)
    run.check(overwrite=False, resume=True)


def test_foreign_files_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run of pedyra"):
        RunFolder(tmp_path).check(overwrite=True, resume=False)


def test_nothing_to_resume_is_said(tmp_path, run):
    with pytest.raises(ValueError, match="holds no run to resume"):
        RunFolder(tmp_path / "new").check(overwrite=False, resume=True)
    append_row(run.metrics, {"step": 3, "final": True})
    with pytest.raises(ValueError, match="is finished"):
        run.check(overwrite=False, resume=True)


def test_overwrite_and_resume_exclude_each_other(run):
    with pytest.raises(ValueError, match="exclude each other"):
        run.check(overwrite=True, resume=True)


def test_an_output_that_is_a_file_is_refused(run):
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(run.recipe).check(overwrite=True, resume=False)


class Killed(BaseException):
    pass


def written(run, text):
    """A run whose files all say `text`, beside a user's."""
    for name in ("adapter", "checkpoint-10", "runs", "my-plots"):
        (run.path / name).mkdir(exist_ok=True)
        (run.path / name / "file").write_text("mine" if name == "my-plots" else text)
    for file in (run.recipe, run.metrics):
        file.write_text(text)


def said(run):
    return {str(path.relative_to(run.path)): path.read_text() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("steps", range(12))
def test_a_kill_at_any_point_of_a_replacement_loses_no_run(run, steps, monkeypatch):
    """The old run, or once it is dropped the new one, is whole after the repair; never a mixture."""
    written(run, "old")
    old = said(run)
    left = steps

    def counted(original):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr("pedyra.app.runs.run_folder.write_file", counted(write_file))
        patched.setattr("shutil.rmtree", counted(shutil.rmtree))
        try:
            run.begin("new")
            written(run, "new")
            run.withdraw(replaces=True)
        except Killed:
            pass
    with run.held():  # repairs what is half done
        assert run.holds_run()
        run.withdraw(replaces=True)  # as the next --overwrite does first
    assert said(run) == old


@pytest.mark.parametrize("steps", range(3))
def test_a_kill_while_the_old_run_is_dropped_leaves_the_new_one(run, steps, monkeypatch):
    written(run, "old")
    run.begin("new")
    written(run, "new")
    new = {name: text for name, text in said(run).items() if ".replaced" not in name}
    left = steps

    def half(path, *args):  # some of it is gone
        nonlocal left
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[:left]:
            file.unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", half)
        with pytest.raises(Killed):
            run.drop_aside()
    with run.held():
        assert not run.withdraw(replaces=True)
    assert {name: text for name, text in said(run).items() if ".replaced" not in name} == new


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "environment.json"
    write_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["environment.json"]


def test_a_failed_folder_leaves_the_old_folder_whole(tmp_path):
    adapter = tmp_path / "adapter"
    write_folder(adapter, lambda part: (part.mkdir(), (part / "weights").write_text("old")))

    def fails(part):
        part.mkdir()
        (part / "weights").write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(adapter, fails)
    assert (adapter / "weights").read_text() == "old"
    assert [folder.name for folder in tmp_path.iterdir()] == ["adapter"]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 1})
    with path.open("a") as file:
        file.write(json.dumps({"step": 2})[:6])
    assert read_rows(path) == [{"step": 1}]


def test_the_working_directory_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(Path("."), lambda part: (part.mkdir(), (part / "weights").write_text("new")))
    assert (tmp_path / "weights").read_text() == "new"

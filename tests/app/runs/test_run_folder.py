"""The run folder's rules: nobody's files are lost, and nothing in it is half-written."""

import json
import shutil

import pytest
from file_changes import killed_at

from pedyra.app.runs.run_folder import RunFolder
from pedyra.lora.files import append_row, read_rows, write_file


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_file(folder.environment, '{"of": "first"}\n')
    write_file(folder.recipe, "name: first\n")
    return folder


def test_a_new_or_empty_folder_is_free(tmp_path):
    RunFolder(tmp_path / "new" / "deep").check(overwrite=False, resume=False)
    RunFolder(tmp_path).check(overwrite=False, resume=False)


def foreign(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def project(folder):
    """A project may keep its recipe beside folders that are called as those of a run."""
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "paper.pdf").write_text("years of work")
    (folder / "recipe.yaml").write_text("name: mine\n")


NEW_RUN, RESUME, OVERWRITE = ({"overwrite": over, "resume": go} for over, go in ((0, 0), (0, 1), (1, 0)))
FINAL = {"step": 3, "final": True, "metric": "f1", "seconds": 1.0, "trainable_parameters": 2, "peak_memory_bytes": 3}
REFUSED = [
    (lambda run: run.path, NEW_RUN, "holds another run.*--resume.*--overwrite"),
    (lambda run: run.path, {"overwrite": True, "resume": True}, "exclude each other"),
    (lambda run: run.recipe, OVERWRITE, "is a file"),
    (lambda run: run.path.with_name("new"), RESUME, "holds no run to resume"),
    (lambda run: append_row(run.metrics, FINAL) or run.path, RESUME, "is finished"),
    (lambda run: foreign(run.path.with_name("new")) or run.path.with_name("new"), OVERWRITE, "no run of pedyra"),
    (lambda run: project(run.path.with_name("new")) or run.path.with_name("new"), OVERWRITE, "no run of pedyra"),
]


@pytest.mark.parametrize(("place", "flags", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_where_a_run_must_not_write_is_told(run, place, flags, told):
    run.check(**OVERWRITE)
    run.check(**RESUME)
    with pytest.raises(ValueError, match=told):
        RunFolder(place(run)).check(**flags)


@pytest.fixture
def contents(run):
    """A run whose files all say "old", beside a user's; contents(): what is in the folder."""
    for name in ("adapter", "checkpoint-10", "runs", "my-plots"):
        (run.path / name).mkdir()
        (run.path / name / "file").write_text("old")
    append_row(run.metrics, {"step": 1, "loss": 1.0})
    return lambda: {str(path.relative_to(run.path)): path.read_text() for path in run.path.rglob("*") if path.is_file()}


NEW = {"recipe.yaml": "name: new\n", "environment.json": "{}\n", "metrics.jsonl": '{"step": 2}\n'}


def replace(run):
    run.begin("name: new\n")
    append_row(run.metrics, {"step": 2})
    run.remove_empty_run()


def test_a_new_run_takes_the_place_of_what_a_run_wrote_and_of_nothing_else(run, contents):
    replace(run)
    assert contents() == NEW | {"my-plots/file": "old"}


def test_a_first_run_that_logs_and_saves_nothing_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path)
    run.begin("name: new\n")
    run.remove_empty_run()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_change_leaves_a_run_that_can_be_replaced(run, contents):
    point, killed = 0, True
    pristine = run.path.with_name("pristine")
    shutil.copytree(run.path, pristine)
    while killed:
        point += 1
        killed = killed_at(point, run.path, lambda: replace(run))
        run.check(overwrite=True, resume=False)
        if killed:
            replace(run)
        assert contents() == NEW | {"my-plots/file": "old"}
        shutil.rmtree(run.path)
        shutil.copytree(pristine, run.path)
    assert point > 5


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


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 1})
    with path.open("a") as file:
        file.write(json.dumps({"step": 2})[:6])
    assert read_rows(path) == [{"step": 1}]

"""A run folder of somebody else has links in it: nothing outside of the folder is written, moved or removed."""

import shutil

import pytest
from short_runs import RECIPE, run

from pedyra.app.cli import main
from pedyra.app.recipe import Recipe
from pedyra.app.report.images import save_figures
from pedyra.app.report.page import build_report
from pedyra.app.runs.run_folder import RunFolder
from pedyra.lora.files import append_row, remove, write_file, write_folder

FOLDERS = ("adapter", "checkpoint-4", "checkpoint-12", "_saving", ".adapter.part", "runs", "fit", "export")
FILES = (
    *("metrics.jsonl", "ranks.jsonl", "samples.jsonl", "report.html", "recipe.yaml", "environment.json"),
    *(".lock", ".recipe.yaml.part", ".report.html.part"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; a copy of it is the foreign folder of each test."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(Recipe.model_validate({**RECIPE, "output_dir": str(folder)}))
    return folder


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


def unharmed(victim):
    return [path.name for path in victim.iterdir()] == ["thesis.tex"] and (
        victim / "thesis.tex"
    ).read_text() == "years of work"


@pytest.fixture
def foreign(trained, recipe, victim):
    """foreign(name): the trained run, unfinished, with a link to the victim by that name."""

    def make(name):
        folder = RunFolder(victim.parent / "run")
        shutil.copytree(trained, folder.path)
        rows = folder.metrics.read_text().splitlines(keepends=True)
        folder.metrics.write_text("".join(rows[:-1]))
        remove(folder.path / name)
        (folder.path / name).symlink_to(victim if name in FOLDERS else victim / "thesis.tex")
        return folder

    return make


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_training_refuses_a_folder_with_a_link_in_it(recipe, foreign, victim, name, flags):
    foreign(name)
    with pytest.raises(ValueError, match=rf"{name} is a link"):
        run(recipe(), **flags)
    assert unharmed(victim)


def test_a_run_folder_that_is_reached_by_a_link_is_the_users_own_choice(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert run(recipe()).step == 12
    assert (tmp_path / "disk" / "adapter").is_dir()


def test_a_report_takes_the_place_of_a_link(foreign, victim):
    for name in ("report.html", ".report.html.part"):
        folder = foreign(name)
        build_report(folder.path)
        assert unharmed(victim) and not (folder.path / "report.html").is_symlink()
        shutil.rmtree(folder.path)


def test_figures_are_not_written_through_a_link(trained, victim, tmp_path):
    (tmp_path / "figures").symlink_to(victim)
    with pytest.raises(ValueError, match="figures is a link"):
        save_figures(trained, tmp_path / "figures")
    assert unharmed(victim)


@pytest.mark.parametrize("name", ["export", "fit"])
def test_a_smaller_or_exported_adapter_is_not_written_through_a_link(foreign, victim, name, capsys):
    folder = foreign(name)
    command = {"export": ["export", str(folder.path), "--target", "peft"], "fit": ["fit", str(folder.path)]}[name]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and "victim" not in capsys.readouterr().out
    assert unharmed(victim)


def test_texts_are_not_appended_through_a_link(tmp_path, victim):
    (tmp_path / "samples.jsonl").symlink_to(victim / "thesis.tex")
    with pytest.raises(ValueError, match=r"samples.jsonl is a link"):
        append_row(tmp_path / "samples.jsonl", {"text": "x"})
    assert unharmed(victim)


@pytest.mark.parametrize("name", ["adapter", ".adapter.part"])
def test_a_folder_takes_the_place_of_a_link(tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim)
    write_folder(tmp_path / "adapter", lambda part: (part.mkdir(), (part / "weights").write_text("new")))
    assert unharmed(victim) and not (tmp_path / "adapter").is_symlink()
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


@pytest.mark.parametrize("name", ["recipe.yaml", ".recipe.yaml.part"])
def test_a_file_takes_the_place_of_a_link(tmp_path, victim, name):
    (tmp_path / name).symlink_to(victim / "thesis.tex")
    write_file(tmp_path / "recipe.yaml", "name: x\n")
    assert unharmed(victim) and not (tmp_path / "recipe.yaml").is_symlink()
    assert (tmp_path / "recipe.yaml").read_text() == "name: x\n"


def test_removing_a_link_or_a_folder_with_links_leaves_what_they_lead_to(tmp_path, victim):
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(victim)
    remove(tmp_path / "link")
    remove(tmp_path / "folder")
    remove(tmp_path / "absent")
    assert unharmed(victim) and [path.name for path in tmp_path.iterdir()] == ["victim"]

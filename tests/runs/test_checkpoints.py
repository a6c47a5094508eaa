"""Only a whole checkpoint counts as the last one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pedyra.runs.checkpoints import find_flaw, last_complete_checkpoint, list_checkpoints


def write_checkpoint(run, step, *, ranks=False):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(2, 3), "lora_B": torch.ones(5)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(100)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    if ranks:
        save_file({"E": torch.ones(2)}, folder / "pedyra_state.safetensors")
        (folder / "pedyra_state.json").write_text("{}")
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


@pytest.mark.parametrize("ranks", [False, True])
def test_a_whole_checkpoint_has_no_flaw(tmp_path, ranks):
    assert find_flaw(write_checkpoint(tmp_path, 1, ranks=ranks), with_ranks=ranks) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_file_cut_short_is_found_and_named(tmp_path, name):
    folder = write_checkpoint(tmp_path, 1)
    cut(folder / name)
    assert find_flaw(folder, with_ranks=False) == f"{name} is cut short or damaged"


def test_a_state_that_is_not_trainers_is_found(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    for content in ('{"global_step": 1}', "[]", '{"global_step": null, "log_history": []}'):
        (folder / "trainer_state.json").write_text(content)
        assert find_flaw(folder, with_ranks=False) == "trainer_state.json is damaged"


def test_an_empty_file_is_found(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert find_flaw(folder, with_ranks=False) == "adapter_model.safetensors is cut short or damaged"


def test_rank_files_are_required_only_of_a_run_that_adapts_ranks(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    assert find_flaw(folder, with_ranks=False) is None
    assert find_flaw(folder, with_ranks=True) == "pedyra_state.safetensors is missing"


def test_the_newest_whole_checkpoint_is_chosen_and_the_broken_ones_are_told(tmp_path):
    good = write_checkpoint(tmp_path, 20)
    write_checkpoint(tmp_path, 10)
    broken = write_checkpoint(tmp_path, 30)
    (broken / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path, with_ranks=False) == (good, [(broken, "trainer_state.json is missing")])


def test_no_whole_checkpoint_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint; .*--overwrite"):
        last_complete_checkpoint(tmp_path, with_ranks=False)
    cut(write_checkpoint(tmp_path, 1) / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-1: optimizer.pt is cut short"):
        last_complete_checkpoint(tmp_path, with_ranks=False)

"""Only a whole checkpoint counts as the last one."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from pedyra.lora.files import SUMS, write_sums
from pedyra.trainer.checkpoint_folder import (
    RANK_FILES,
    find_flaw,
    last_complete_checkpoint,
    list_checkpoints,
)

TRAINER_FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
TRAINER_FILES += ("trainer_state.json",)


def resum(folder):
    write_sums(folder, [path.name for path in folder.iterdir() if path.name != SUMS])


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
        (folder / "pedyra_state.json").write_text(json.dumps({"step": step}))
    resum(folder)
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


@pytest.mark.parametrize("name", [*TRAINER_FILES, "rng_state.pth", *RANK_FILES])
def test_any_flipped_bit_is_found_and_its_file_named(tmp_path, name):
    folder = write_checkpoint(tmp_path, 1, ranks=True)
    whole = (folder / name).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 20)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        (folder / name).write_bytes(data)
        assert find_flaw(folder, with_ranks=True) == f"{name} does not match {SUMS}: damaged, or of another save"


@pytest.mark.parametrize("name", [*TRAINER_FILES, "rng_state.pth", *RANK_FILES, SUMS])
def test_a_file_that_is_cut_short_or_missing_is_found_and_named(tmp_path, name):
    folder = write_checkpoint(tmp_path, 1, ranks=True)
    cut(folder / name)
    flaw = str(find_flaw(folder, with_ranks=True))
    assert f"{name} is damaged" in flaw or f"{name} does not match" in flaw
    (folder / name).unlink()
    assert find_flaw(folder, with_ranks=True) == f"{name} is missing"


def test_digests_are_those_of_sha256sum(tmp_path):
    write_checkpoint(tmp_path, 1, ranks=True)
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "checkpoint-1", capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(TRAINER_FILES) + 3


def test_a_file_of_another_save_is_found(tmp_path):
    folder, other = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    torch.save({"state": torch.arange(7)}, other / "optimizer.pt")
    shutil.copy(other / "optimizer.pt", folder)
    assert find_flaw(folder, with_ranks=False) == f"optimizer.pt does not match {SUMS}: damaged, or of another save"


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
    with pytest.raises(ValueError, match=r"checkpoint-1: optimizer.pt does not match SHA256SUMS"):
        last_complete_checkpoint(tmp_path, with_ranks=False)

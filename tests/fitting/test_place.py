"""A fit for the place where the adapter will be served: which ranks are asked, and the form in which it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from classifier_rows import logits, rows
from closeness import close
from peft import PeftModel

import pedyra
from pedyra.errors import UserError
from pedyra.export.destinations import destination
from pedyra.fitting.sizes import ranks_at


@pytest.mark.parametrize(
    ("name", "own", "ranks"),
    [
        ("vllm", 3, [8, 1]),
        ("vllm", 600, [512, 320, 256, 128, 64, 32, 16, 8, 1]),
        ("wandb", 64, [16, 8, 6, 4, 3, 2, 1]),  # which takes any rank up to 16
        ("fireworks", 16, [16, 8, 6, 4]),
        ("peft", 16, [16, 8, 6, 4, 3, 2, 1]),
    ],
)
def test_the_ranks_of_a_place_are_asked_from_the_adapters_own_down(name: str, own: int, ranks: list[int]):
    assert ranks_at(destination(name), own) == ranks


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_fit_is_saved_in_the_form_of_the_place(make_trainer: Any, tmp_path: Path):
    """vLLM's is one rank for all layers, by zeros where one has fewer, which change nothing."""
    trainer = make_trainer(lora={"rank_pattern": {"query": 1}})
    found = pedyra.fit(trainer, rows=96, rank=2)
    plain, served = found.save(tmp_path / "plain"), found.save(tmp_path / "served", for_="vllm")
    assert config(plain)["rank_pattern"] and not config(served)["rank_pattern"]
    assert config(served)["r"] == 2
    assert (served / "pedyra_fit.json").read_text() == (plain / "pedyra_fit.json").read_text()
    held = rows(16, 7)
    found.apply()
    loaded = PeftModel.from_pretrained(make_trainer(trains=False).model.unload(), served)
    assert close(logits(loaded, held), logits(trainer.model, held))


@pytest.mark.parametrize("place", ["vllm", "vllm:1"])
def test_a_fit_for_a_place_asks_its_ranks_and_is_saved_for_it(make_trainer: Any, tmp_path: Path, place: str):
    """Of the ranks below 4 vLLM takes 1 alone, and for nearly all that was won it is enough."""
    found = pedyra.fit(make_trainer(), rows=96, tolerance="90%", for_=place)
    assert [each.rank for each in found.curve] == [4, 1] and found.chosen.rank == 1
    assert found.by_rank == (place == "vllm:1")
    served = found.save(tmp_path / "served")
    assert config(served)["r"] == 1 and (served / "pedyra_export.json").is_file()
    assert not (found.save(tmp_path / "plain", for_="peft") / "pedyra_export.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"for_": "vllm:3"}, "at a rank of 1, 8, 16"),
        ({"for_": "vllm", "rank": 2}, "leave out rank"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_fit(make_trainer: Any, asked: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as told:
        pedyra.fit(make_trainer(trains=False), **asked)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("vllm:1", "up to rank 1, and this one has rank 2"),
        ("fireworks", "it takes no dense and no query and no value"),
        ("vllm", r"adapter 'default': DoRA \(use_dora\)"),
    ],
)
def test_what_a_place_does_not_take_is_told_before_anything_is_written(
    make_trainer: Any, tmp_path: Path, place: str, message: str
):
    trainer = make_trainer(lora={"use_dora": place == "vllm"}, trains=False)
    found = pedyra.fit(trainer, rows=96, rank=2)
    with pytest.raises(UserError, match=message) as told:
        found.save(tmp_path / "out", for_=place)
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()
    if place in ("vllm", "fireworks"):
        with pytest.raises(UserError, match=message):
            pedyra.fit(trainer, rows=96, for_=place)

"""Destinations: the table, and what is asked of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pedyra.app.export.destinations import destination, destinations
from pedyra.app.export.export import export_adapter
from pedyra.lora.folder import read_lora


def test_each_row_says_where_it_is_known_from():
    rows = destinations()
    assert list(rows) == ["peft", "vllm", "sglang", "llama.cpp", "tensorrt-llm", "cloudflare", "fireworks", "wandb"]
    for row in rows.values():
        assert row.sources and all(source.startswith("https://") for source in row.sources)
        assert row.serve and row.form in ("peft", "padded", "gguf")


@pytest.mark.parametrize(
    ("name", "largest", "rank", "below"),
    [
        ("vllm", 9, 16, [16, 8, 1]),
        ("vllm", 600, None, [512, 320, 256, 128, 64, 32, 16, 8, 1]),
        ("fireworks", 2, 4, [4]),
        ("fireworks", 100, None, [64, 32, 16, 8, 4]),
        ("peft", 6, 6, [6, 4, 2, 1]),
        ("wandb", 16, 16, [16, 8, 4, 2, 1]),
    ],
)
def test_ranks_that_hold_an_adapter(name: str, largest: int, rank: int | None, below: list[int]):
    assert destination(name).rank_for(largest) == rank
    assert destination(name).ranks_below(largest) == below


def test_a_rank_may_be_asked_for():
    assert destination("vllm:16").rank == 16 and destination("vllm").rank is None
    assert destination("llama.cpp:5").rank == 5


@pytest.mark.parametrize("text", ["vlm", "", "vllm:12", "vllm:", "vllm:x", "vllm:0", "fireworks:2", "wandb:32"])
def test_another_one_is_a_mistake_in_one_line(text: str):
    with pytest.raises(ValueError) as told:
        destination(text)
    assert "\n" not in str(told.value)


def test_an_unknown_name_is_told_all_that_there_are():
    with pytest.raises(ValueError) as told:
        destination("ollama")
    assert all(name in str(told.value) for name in destinations())


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of biases where the base has none
@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, {}),
        ({"use_dora": True}, {"use_dora": {"vllm", "sglang", "llama.cpp", "cloudflare", "fireworks", "wandb"}}),
        ({"bias": "all"}, {"bias": {*destinations()} - {"peft"}}),
        ({"target_modules": ["v_proj", "o_proj"]}, {"target_modules": {"sglang"}}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": {*destinations()} - {"peft", "tensorrt-llm"}}),
    ],
)
def test_what_a_place_refuses_is_named(make_llama: Any, tmp_path: Path, settings: dict[str, Any], refused: Any):
    make_llama(**settings).save_pretrained(tmp_path / "adapter")
    lora = read_lora(tmp_path / "adapter")
    found: dict[str, set[str]] = {}
    for name, place in destinations().items():
        for refusal in place.refusals(lora):
            found.setdefault(refusal.field, set()).add(name)
    found.pop("embeddings", None)
    assert found == refused


def test_reserved_bytes_are_those_of_every_slot_in_every_layer():
    widths = [(16, 16), (16, 8)]
    assert destination("vllm").reserved_bytes(widths, 8, 3) == 3 * 8 * (32 + 24) * 2
    assert destination("sglang").reserved_bytes(widths, 8) == 8 * 8 * (32 + 24) * 2  # its own number of slots
    assert destination("peft").reserved_bytes(widths, 8) == 8 * (32 + 24) * 2


def test_several_adapters_are_served_by_one_server():
    (line,) = destination("vllm").commands("my/base", {"a": Path("x y"), "b": Path("z")}, 16, ["q_proj", "v_proj"])
    assert "--max-loras 2 --max-lora-rank 16 --lora-target-modules q_proj v_proj" in line
    assert line.endswith("--lora-modules a='x y' b=z")
    convert, serve = destination("llama.cpp").commands("base", {"a": Path("x")}, 4)
    assert convert.startswith("python convert_lora_to_gguf.py x ") and serve.endswith("--lora a.gguf")


def test_the_form_of_a_place_is_a_target_of_export(make_llama: Any, tmp_path: Path):
    make_llama().save_pretrained(tmp_path / "adapter")
    for form in {place.form for place in destinations().values()}:
        assert export_adapter(tmp_path / "adapter", form, tmp_path / form)

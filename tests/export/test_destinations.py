"""Destinations: the table, and what is asked of a row."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from pedyra.errors import UserError
from pedyra.export.destinations import destination, destinations
from pedyra.export.readers import export_lora
from pedyra.lora.folder import SavedLayer, SavedLora, read_lora


def test_each_row_says_where_it_is_known_from():
    rows = destinations()
    assert list(rows) == ["peft", "vllm", "sglang", "llama.cpp", "tensorrt-llm", "cloudflare", "fireworks", "wandb"]
    for row in rows.values():
        assert row.sources and all(source.startswith("https://") for source in row.sources)
        assert row.serve and row.form in ("peft", "padded", "gguf")


@pytest.mark.parametrize(
    ("name", "largest", "rank"),
    [
        ("vllm", 9, 16),
        ("vllm", 600, None),
        ("fireworks", 2, 4),
        ("fireworks", 100, None),
        ("peft", 6, 6),
        ("wandb", 16, 16),
    ],
)
def test_the_rank_that_holds_an_adapter(name: str, largest: int, rank: int | None):
    assert destination(name).rank_for(largest) == rank


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
        ({"use_dora": True}, {"use_dora": {*destinations()} - {"peft"}}),
        ({"bias": "all"}, {"bias": {*destinations()} - {"peft"}}),
        ({"target_modules": ["v_proj", "o_proj"]}, {"target_modules": {"sglang"}}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": {*destinations()} - {"peft"}}),
    ],
)
def test_what_a_place_refuses_is_named(make_llama: Any, tmp_path: Path, settings: dict[str, Any], refused: Any):
    make_llama(**settings).save_pretrained(tmp_path / "adapter")
    lora = read_lora(tmp_path / "adapter")
    found: dict[str, set[str]] = {}
    for name, place in destinations().items():
        for field in place.refused_for(lora):
            found.setdefault(field.partition(",")[0], set()).add(name)
    assert all(found[field] == places for field, places in refused.items()) and bool(found) == bool(refused)
    for name, place in destinations().items():
        if any(name in places for places in refused.values()):
            with pytest.raises(UserError):
                place.check(lora)
        else:
            place.check(lora)


def test_names_that_are_no_text_are_refused_as_any_other(make_llama: Any, tmp_path: Path):
    make_llama().save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    damaged = replace(lora, config={**lora.config, "modules_to_save": [["classifier"]]})
    assert [name for name, _ in destination("vllm").refusals(damaged)] == ["modules_to_save"]


@pytest.mark.parametrize(
    ("names", "dropped"),
    [
        (["bert.pooler.dense", "bert.encoder.layer.0.output.dense"], ["bert.pooler.dense"]),
        (
            ["model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.q_proj"],
            ["model.visual.blocks.0.attn.qkv"],
        ),
        (["model.layers.0.visualize.q_proj", "score"], []),
    ],
)
def test_vllm_leaves_out_the_layers_that_it_cannot_wrap(names: list[str], dropped: list[str]):
    assert destination("vllm").dropped(names) == dropped and destination("peft").dropped(names) == []


def test_a_layer_that_would_be_left_out_is_refused_unless_it_does_nothing(make_bert: Any, tmp_path: Path):
    model = make_bert(exclude_modules=None, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    lora = read_lora(tmp_path / "adapter")
    assert destination("vllm").refused_for(lora) == ["layers"]
    destination("vllm").check(lora)  # a fit may cut it away
    with pytest.raises(UserError, match=r"vLLM leaves the LoRA of bert\.pooler\.dense in .* out") as told:
        destination("vllm").check(lora, 3)
    assert "\n" not in str(told.value)
    model.get_base_model().bert.pooler.dense.lora_B["default"].weight.data.zero_()
    model.save_pretrained(tmp_path / "cut")
    destination("vllm").check(read_lora(tmp_path / "cut"), 3)


def test_a_classifier_is_served_on_a_base_that_was_saved_with_its_head(make_bert: Any, tmp_path: Path):
    """A base without a head would load as an embedder. vLLM wraps no module `dense` of a BERT by the end of its name,
    since one of them is the pooler's."""
    model = make_bert()
    BertModel(model.config).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    prepare, serve = destination("vllm").commands({"a": read_lora(tmp_path / "adapter")})
    done = subprocess.run([sys.executable, *shlex.split(prepare)[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(serve)
    folder = tmp_path / words[2]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert words[words.index("--tokenizer") + 1] == str(tmp_path / "base")
    modules = words[words.index("--lora-target-modules") + 1 : words.index("--lora-modules")]
    assert {"query", "value", "bert.encoder.layer.0.output.dense"} <= {*modules} and "dense" not in modules
    assert not any("pooler" in name for name in modules)


def test_a_slot_has_every_layer_that_is_wrapped_at_its_rank():
    assert destination("vllm").slot_bytes([(16, 16), (16, 8)], 8) == 8 * (32 + 24) * 2


def saved(folder: str, ranks: dict[str, int], **config: Any) -> SavedLora:
    """What a folder of an adapter to my/base with these ranks would hold, of which a command is told."""
    layers = [SavedLayer(f"model.{name}", {"A": "a", "B": "b"}, rank, 1.0) for name, rank in ranks.items()]
    tensors = {"a": torch.ones(1, 1), "b": torch.ones(1, 1)}
    return SavedLora(folder, Path(folder), {"base_model_name_or_path": "my/base", **config}, tensors, layers)


def test_several_adapters_are_served_by_one_server():
    adapters = {"a": saved("x y", {"q_proj": 2}), "b": saved("z", {"q_proj": 1, "v_proj": 9})}
    (line,) = destination("vllm").commands(adapters)
    assert line.startswith("vllm serve my/base --enable-lora")
    assert "--max-loras 2 --max-lora-rank 16 --lora-target-modules q_proj v_proj" in line
    assert line.endswith("--lora-modules a='x y' b=z")
    convert, serve = destination("llama.cpp").commands({"a": adapters["b"]})
    assert convert.startswith("python convert_lora_to_gguf.py z ") and serve.endswith("--lora a.gguf")


def test_a_server_is_told_the_rank_that_was_named_and_the_revision_of_the_base():
    (line,) = destination("vllm:32").commands({"a": saved("x", {"q_proj": 2}, revision="v2")})
    assert line.startswith("vllm serve my/base --revision v2 ") and "--max-lora-rank 32 " in line
    (line,) = destination("vllm").commands(
        {"a": saved("x", {"q_proj": 2}, base_model_name_or_path="./base", revision="v2")}
    )
    assert "--revision" not in line  # of a folder there is one


@pytest.mark.parametrize(
    ("task", "name"),
    [("SEQ_CLS", "SequenceClassification"), ("CAUSAL_LM", "CausalLM"), ("SEQ_2_SEQ_LM", "Seq2SeqLM")],
)
def test_peft_loads_an_adapter_by_the_class_of_its_task(task: str, name: str):
    (line,) = destination("peft").commands({"a": saved("x", {"query": 2}, task_type=task)})
    assert f"import AutoPeftModelFor{name} as" in line


@pytest.mark.parametrize(
    ("place", "rank"), [("vllm", 600), ("vllm:8", 9), ("fireworks", 3), ("fireworks", 65), ("wandb", 17)]
)
def test_a_rank_that_a_place_does_not_take_is_told_in_one_line(place: str, rank: int):
    destination(place).check(lora := saved("x", {"q_proj": rank}))  # whose rank is none of the refusals
    with pytest.raises(UserError, match=f"and this one has rank {rank}") as told:
        destination(place).check(lora, rank)
    assert "\n" not in str(told.value)


def test_the_form_of_a_place_is_a_target_of_export(make_llama: Any, tmp_path: Path):
    make_llama().save_pretrained(tmp_path / "adapter")
    for form in {place.form for place in destinations().values()}:
        assert export_lora(tmp_path / "adapter", form, tmp_path / form)


def test_a_file_that_is_too_large_for_a_host_is_told_before_it_is_written():
    """4 bytes for each of 2 x 1,200,000 x 32 numbers are 307 MB, and at a rank of 31 there are 298."""
    A, B = torch.empty(16, 1_200_000, device="meta"), torch.empty(1_200_000, 16, device="meta")
    layer = SavedLayer("v_proj", {"A": "a", "B": "b"}, 16, 1.0)
    lora = SavedLora("x", Path("x"), {}, {"a": A, "b": B}, [layer])
    destination("cloudflare").check(lora, 31)
    with pytest.raises(UserError, match=r"below 300 MB, and at rank 32 this one has 307; ask for less"):
        destination("cloudflare").check(lora, 32)

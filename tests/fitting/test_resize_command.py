"""pedyra resize: what PEFT reads of it is the truncated update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import PeftModel
from torch import Tensor

from pedyra.app.cli import main
from pedyra.export.destinations import destination
from pedyra.fitting.resize import Size, resize_adapter
from pedyra.lora.folder import read_lora

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def updates(model: Any) -> dict[str, Tensor]:
    """s B A of each layer."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        return {
            name: layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            for name, layer in layers.items()
        }


@pytest.fixture
def trained(make_llama: Any, tmp_path: Path) -> Any:
    """Makes a model with factors that are no start, its folder, and a copy of its base."""

    def make(**settings: Any) -> Any:
        model = make_llama(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3) if "magnitude" not in name else parameter.data.mul_(1.1)
        model.save_pretrained(tmp_path / "adapter")
        model.get_base_model().save_pretrained(tmp_path / "unused")
        return model

    return make


@pytest.mark.parametrize("kind", SETTINGS)
def test_peft_loads_the_truncated_update(kind: str, trained: Any, make_llama: Any, tmp_path: Path):
    model = trained(**SETTINGS[kind])
    found = resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(rank=2))
    loaded = PeftModel.from_pretrained(make_llama().unload(), str(tmp_path / "out"))
    whole, small = updates(model), updates(loaded)
    assert whole.keys() == small.keys()
    gone = total = 0.0
    for name, update in whole.items():
        U, values, V = torch.linalg.svd(update)
        assert torch.allclose(small[name], U[:, :2] * values[:2] @ V[:2], atol=1e-5)
        gone, total = gone + float(values[2:].square().sum()), total + float(values.square().sum())
    assert found.error == pytest.approx((gone / total) ** 0.5, abs=1e-5)
    before, after = read_lora(tmp_path / "adapter"), read_lora(tmp_path / "out")
    for layer in before.layers:
        (twin,) = (each for each in after.layers if each.name == layer.name)
        assert twin.scaling == pytest.approx(layer.scaling)
        if "magnitude" in layer.keys:
            assert same_bits(before.tensors[layer.keys["magnitude"]], after.tensors[layer.keys["magnitude"]])


def test_a_rank_of_all_is_the_adapter_to_the_last_bit(trained: Any, tmp_path: Path):
    trained()
    found = resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(rank=16))
    before, after = read_lora(tmp_path / "adapter").tensors, read_lora(tmp_path / "out").tensors
    assert found.error == 0 and all(same_bits(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("part", "rank"), [(1.0, 4), (0.74, 2), (0.5, 2)])
def test_a_size_in_megabytes_is_the_highest_rank_that_fits(part: float, rank: int, trained: Any, tmp_path: Path):
    trained()
    whole = sum(tensor.nbytes for tensor in read_lora(tmp_path / "adapter").tensors.values())
    resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(megabytes=part * whole / 1e6))
    assert {layer.rank for layer in read_lora(tmp_path / "out").layers} == {rank}


def test_a_place_has_its_form_and_its_command(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained(rank_pattern={"v_proj": 12})
    options = ["--for", "vllm:8", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows")]
    with pytest.raises(SystemExit) as ended:
        main(["resize", str(tmp_path / "adapter"), *options])
    assert ended.value.code == 0
    small = read_lora(tmp_path / "out")
    assert {layer.rank for layer in small.layers} == {8} == {small.config["r"]}
    assert not destination("vllm").refused_for(small)
    told = capsys.readouterr().out
    assert "not proved" in told and f"pedyra prove {tmp_path / 'adapter'} {tmp_path / 'out'}" in told
    assert "--max-lora-rank 8 " in told
    for given, code in (([], 2), (["--overwrite"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["resize", str(tmp_path / "adapter"), "--rank", "2", "--out", str(tmp_path / "out"), *given])
        assert ended.value.code == code
    assert {layer.rank for layer in read_lora(tmp_path / "out").layers} == {2}
    *layers, total = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert total["proved"] is False and sum(row["parameters"] for row in layers) == total["parameters"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rank", "2", "--energy", "0.9"],
        ["--rank", "0"],
        ["--energy", "1.5"],
        ["--mb", "0.00001"],
        ["--for", "vllm"],
        ["--for", "nowhere:8"],
        ["--for", "vllm:12"],
        ["--rank", "4", "--for", "vllm:1"],
    ],
)
def test_bad_input_is_one_line(options: list[str], trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained()
    with pytest.raises(SystemExit) as ended:
        main(["resize", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["llama.cpp", "wandb"])
def test_a_refusal_names_the_adapter_that_was_given(place: str, trained: Any, tmp_path: Path):
    trained()
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"lora_alpha": 0}  # so that it adds nothing, for any reader
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="scaling") as told:
        resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(rank=2), destination(place))
    assert str(told.value).startswith(str(tmp_path / "adapter"))


def test_dora_is_not_made_for_a_place_without_it(trained: Any, tmp_path: Path):
    trained(use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(rank=2), destination("vllm"))


def test_a_layer_that_the_place_leaves_out_keeps_nothing_and_that_is_told(make_bert: Any, tmp_path: Path):
    model = make_bert(exclude_modules=None, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    resized = resize_adapter(tmp_path / "adapter", tmp_path / "out", Size(rank=8), destination("vllm"))
    lost = "bert.pooler.dense"
    (line,) = [line for line in resized.lines() if line.startswith("without")]
    assert resized.dropped == [lost] and lost in line
    before, after = (
        updates(PeftModel.from_pretrained(make_bert().unload(), str(tmp_path / folder)))
        for folder in ("adapter", "out")
    )
    for name, update in before.items():
        assert torch.allclose(after[name], torch.zeros_like(update) if name.endswith(lost) else update, atol=1e-6)

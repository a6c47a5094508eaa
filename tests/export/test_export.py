"""Exported folders, read by the scaling rules of PEFT, vLLM and llama.cpp, give the live model's update."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from pedyra import attach, detach, export_adapter
from pedyra.fitting.cut import check_out
from pedyra.lora.attach import write_ranks
from pedyra.lora.layer import adapted_layers
from pedyra.lora.replacement import NewTriples, put_replacements, replacements_of

FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "pissa": {"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
    "orthogonal": {"r": 2, "lora_alpha": 6, "init_lora_weights": "orthogonal"},  # PEFT wants its rank even
    "scalings": {"r": 3, "lora_alpha": 6, "alpha_pattern": {"q_proj": 1, "down_proj": 30}},
}

# PEFT takes the bias of a lora_B for the shard of a matrix.
_IGNORE_BIAS = pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:UserWarning")


def mixed_ranks(model: Any) -> Any:
    """`model` with triples of ranks 1, 3, 6, 0, 1, ... that have learned something; in eval mode."""
    attach(model)
    generator = torch.Generator().manual_seed(11)
    for index, layer in enumerate(adapted_layers(model)):
        rank = (1, 3, 6, 0)[index % 4]
        shapes = ((rank, layer.a.in_features), (rank,), (layer.b.out_features, rank))
        new = NewTriples(*(torch.randn(shape, generator=generator) / 4 for shape in shapes))
        put_replacements([(layer, replacements_of(layer, range(layer.rank), new))])
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1 + torch.rand(parameter.shape, generator=generator)
    write_ranks(model)
    return model.eval()


def logits(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tokens).logits


def live_deltas(model: Any, pristine: Any) -> dict[str, Tensor]:
    """Layer -> what the adapter adds to the weight of the base model as it was before PEFT touched it."""
    before = dict(pristine.get_base_model().named_modules())
    return {
        layer.name: (
            layer.module.base_layer.weight
            + layer.scaling * layer.b.weight @ torch.diag(layer.a.E) @ layer.a.A
            - before[layer.name].base_layer.weight
        ).detach()
        for layer in adapted_layers(model)
    }


def read_as(consumer: str, folder: Path) -> dict[str, Tensor]:
    """Layer -> update of its weight, as `consumer` computes it from the two files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = tensors[key.replace("lora_A", "lora_B")]
        if consumer == "peft":  # tuners/lora/model.py: patterns whose key ends the layer's name, then update_layer
            rank, alpha = (
                next((value for k, value in config[pattern].items() if re.match(rf"(.*\.)?({k})$", name)), config[key])
                for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
            assert A.shape[0] == B.shape[1] == rank, "PEFT could not load it"
            scaling = alpha / (rank**0.5 if config["use_rslora"] else rank)
        elif consumer == "vllm":  # lora/peft_helper.py: one factor; patterns are no fields of PEFTHelper
            assert A.shape[0] <= config["r"] and not config["use_dora"]
            scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        else:  # convert_lora_to_gguf.py keeps lora_alpha alone; llama-adapter.h, get_scale: alpha / b->ne[0]
            scaling = config["lora_alpha"] / B.shape[1]
        deltas[name] = scaling * B @ A
    return deltas


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


RIGHT = {"peft": ("peft", "vllm"), "padded": ("peft", "vllm", "llama.cpp"), "gguf": ("peft", "llama.cpp")}


@pytest.mark.parametrize("flavour", ["plain", "pissa", "rslora", "orthogonal", "scalings"])
@pytest.mark.parametrize("target", list(RIGHT))
def test_each_target_is_right_for_its_readers_and_the_others_would_be_wrong(target, flavour, make_llama, tmp_path):
    model = mixed_ranks(make_llama(**FLAVOURS[flavour]))
    expected = live_deltas(model, make_llama())
    folder = export_adapter(model, target, tmp_path / "out")
    readers = {reader for reader in ("peft", "vllm", "llama.cpp") if agree(read_as(reader, folder), expected)}
    assert readers == set(RIGHT[target])


@pytest.mark.parametrize("target", list(RIGHT))
def test_an_adapter_that_pedyra_never_saw_is_right_too(target, make_llama, tmp_path):
    model = make_llama(r=3, lora_alpha=4, use_rslora=True, rank_pattern={"q_proj": 5}, init_lora_weights="gaussian")
    expected = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
            expected[name] = module.get_delta_weight("default").detach()
    model.save_pretrained(tmp_path / "saved")
    folder = export_adapter(tmp_path / "saved", target, tmp_path / "out")
    assert all(agree(read_as(reader, folder), expected) for reader in RIGHT[target])
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_rounding_of_alpha_over_r_is_no_other_scaling(make_llama, tmp_path):
    model = mixed_ranks(make_llama(r=3, lora_alpha=0.3))  # 0.1 * 6 / 6 is not 0.1 to the last bit
    record = json.loads((export_adapter(model, "peft", tmp_path / "out") / "pedyra_export.json").read_text())
    assert record["scaling"] == 0.1 and record["folded_into_B"] == {}


def test_the_tokenizer_that_was_saved_beside_an_adapter_goes_along(make_llama, tmp_path):
    """It has the template, and the added tokens, of the training; without it a merge takes that of the base."""
    mixed_ranks(make_llama()).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_args.bin"):
        (tmp_path / "saved" / name).write_text(name)
    out = export_adapter(tmp_path / "saved", "padded", tmp_path / "out")
    found = {file.name: file.read_text() for file in out.iterdir() if file.suffix not in (".safetensors", ".bin")}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert found[name] == name
    assert not (out / "training_args.bin").exists()


def test_a_mount_point_is_refused_before_the_work(make_llama, tmp_path, monkeypatch):
    """A finished folder takes the place of `out` by a rename, and nothing can take that of a volume."""
    model, out = make_llama(), tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    for refused in (lambda: export_adapter(model, "peft", out), lambda: check_out(out)):
        with pytest.raises(ValueError, match="volume is a mount point, .* give a folder inside it"):
            refused()
    assert export_adapter(model, "peft", out / "adapter").is_dir()


def test_a_saved_folder_exports_as_the_live_model_does(make_llama, tmp_path):
    model = mixed_ranks(make_llama(**FLAVOURS["pissa"]))
    model.save_pretrained(tmp_path / "saved")
    for target in RIGHT:
        live = export_adapter(model, target, tmp_path / f"live-{target}")
        saved = export_adapter(tmp_path / "saved", target, tmp_path / f"saved-{target}")
        for name in ("adapter_model.safetensors", "adapter_config.json", "pedyra_export.json"):
            assert (live / name).read_bytes() == (saved / name).read_bytes()


def test_ranks_and_patterns_are_those_of_the_convention(make_llama, tmp_path):
    model = mixed_ranks(make_llama(r=3, lora_alpha=6))  # s = 2
    on_disk = {layer.name: max(1, layer.rank) for layer in adapted_layers(model)}
    configs = {
        target: json.loads((export_adapter(model, target, tmp_path / target) / "adapter_config.json").read_text())
        for target in RIGHT
    }
    assert {(config["r"], config["lora_alpha"]) for config in configs.values()} == {(6, 12)}
    assert [configs[target]["rank_pattern"] for target in RIGHT] == [on_disk, {}, on_disk]
    doubled = {name: 2 * rank for name, rank in on_disk.items()}
    assert [configs[target]["alpha_pattern"] for target in RIGHT] == [doubled, {}, {}]


def test_equal_ranks_need_no_pattern_and_no_change_of_a_weight(make_llama, tmp_path):
    model = make_llama(r=4, lora_alpha=8)
    model.save_pretrained(tmp_path / "saved")
    before = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for target in RIGHT:
        folder = export_adapter(tmp_path / "saved", target, tmp_path / target)
        after = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)


def test_the_record_tells_what_vllm_needs_and_what_was_folded(make_llama, tmp_path, caplog):
    model = mixed_ranks(make_llama(**FLAVOURS["scalings"]))
    record = json.loads((export_adapter(model, "peft", tmp_path / "out") / "pedyra_export.json").read_text())
    assert record["scaling"] == 2 and record["max_rank"] == 6
    assert record["vllm"] == {"max_lora_rank": 8, "refused_for": []}
    ratios = {layer.name: layer.scaling / 2 for layer in adapted_layers(model)}
    assert record["folded_into_B"] == pytest.approx({name: ratio for name, ratio in ratios.items() if ratio != 1})
    assert "4 of 14 layers have another scaling than 2" in caplog.text


def test_bfloat16_stays_bfloat16(make_net, tmp_path):
    model = mixed_ranks(make_net(dtype=torch.bfloat16))
    for target in RIGHT:
        tensors = load_file(export_adapter(model, target, tmp_path / target) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@_IGNORE_BIAS
@pytest.mark.parametrize("target", ["peft", "padded"])
def test_biases_of_b_are_scaled_with_it(target, make_net, tmp_path):
    model = mixed_ranks(make_net(lora_bias=True, alpha_pattern={"1": 1}))
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.module.lora_B["default"].bias)
    loaded = PeftModel.from_pretrained(make_net().unload(), export_adapter(model, target, tmp_path / "out"))
    x = torch.randn(5, 8)
    assert torch.allclose(loaded.eval()(x), model(x), atol=1e-6)


def test_the_active_adapter_is_written_also_under_another_name(make_llama, tmp_path):
    model = make_llama()
    model.add_adapter("second", LoraConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    folder = export_adapter(model, "peft", tmp_path / "out")
    assert json.loads((folder / "pedyra_export.json").read_text())["max_rank"] == 5


@pytest.mark.parametrize("attached", [True, False])
def test_an_adapter_on_weights_that_another_has_changed_is_refused(attached, make_llama, tokens, tmp_path):
    model = make_llama(init_lora_weights="pissa")
    if attached:
        attach(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    if attached:
        export_adapter(model, "peft", tmp_path / "first")
    model.set_adapter("second")
    with pytest.raises(ValueError, match="'default' began as a part of the weights .*merge_and_unload"):
        export_adapter(model, "padded", tmp_path / "out")
    if attached:
        detach(model)  # which gives the weights back
        folder = export_adapter(model, "padded", tmp_path / "out")
        loaded = PeftModel.from_pretrained(make_llama().unload(), folder)
        assert torch.allclose(logits(loaded, tokens), logits(model, tokens), atol=1e-5)


def test_an_empty_folder_is_filled_and_one_with_files_is_left_alone(make_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (export_adapter(make_llama(), "peft", str(tmp_path / "empty")) / "adapter_config.json").is_file()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="full already holds files, and no earlier export"):
            export_adapter(make_llama(), "peft", tmp_path / "full", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_an_earlier_export_is_replaced_where_that_is_asked_for(make_llama, tmp_path):
    out = export_adapter(make_llama(), "padded", tmp_path / "out")
    (out / "of the earlier one").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        export_adapter(make_llama(), "peft", out)
    export_adapter(make_llama(), "peft", out, overwrite=True)
    assert json.loads((out / "pedyra_export.json").read_text())["target"] == "peft"
    assert not (out / "of the earlier one").exists()
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ValueError, match="is a link"):
        export_adapter(make_llama(), "peft", tmp_path / "link", overwrite=True)


def two_adapters(llama: Any, folder: Path) -> Path:
    llama().save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    return folder


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown target": (lambda llama, _: llama(), {"target": "ggu"}, "'ggu' is unknown; did you mean 'gguf'"),
    "base": (lambda llama, _: llama(), {"base": "x"}, "base is given, but target peft needs no base model"),
    "scaling of 0": (lambda llama, _: llama(lora_alpha=0), {}, "scaling .* of 0"),
    "no adapter in a folder": (lambda _, folder: folder, {}, "holds no adapter"),
    "files of two adapters": (two_adapters, {}, "down_proj has factors of rank 3 and 3, the config says 4"),
    "no adapter": (lambda llama, _: llama().unload(), {}, "LlamaForCausalLM without an adapter; give the model that"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_exported_is_refused_in_one_line(case, make_llama, tmp_path):
    make, given, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as refusal:
        export_adapter(make(make_llama, tmp_path), **{"target": "peft", "out": tmp_path / "out", **given})
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()

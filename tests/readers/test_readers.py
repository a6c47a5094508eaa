"""What pedyra writes, read by the programs that serve it: each loader's own code, and the account that
destinations.yaml gives of it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, Trainer, TrainingArguments

import pedyra
from pedyra.export.destinations import destination
from pedyra.export.export import export_adapter
from pedyra.lora.folder import read_lora

TOKENS = [1, 40, 7, 200, 90, 13, 77, 250, 5, 31]
pytestmark = [pytest.mark.readers, pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")]

MIXED = {
    # Layers of several ranks and scalings, as a fit or a training with PE-DyRA leaves them.
    "rank_pattern": {"layers.0.self_attn.v_proj": 6, "layers.1.mlp.up_proj": 2, "layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 12, "layers.1.mlp.up_proj": 4, "layers.1.self_attn.q_proj": 9},
}


def updates(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The update of each layer as PEFT itself computes it."""
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name.removeprefix("base_model.model."): layer.get_delta_weight("default") for name, layer in layers.items()}


def stacked(found: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The same for SGLang's layers, q, k and v in one, gate and up in one; zeros for what has none."""
    parts = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    parts |= {"self_attn.o_proj": ("o_proj",), "mlp.down_proj": ("down_proj",)}
    shapes = {name: module.weight.shape for name, module in model.named_modules() if hasattr(module, "weight")}
    whole = {}
    for layer in range(2):
        for name, ends in parts.items():
            place, _, end = name.partition(".")
            names = [f"model.layers.{layer}.{place}.{each}" for each in ends]
            whole[f"{layer}.{end}"] = torch.cat([found.get(each, torch.zeros(shapes[each])) for each in names])
    return whole


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest difference in a layer, as a part of its norm."""
    assert found.keys() == truth.keys()
    return max(float((found[name] - truth[name]).norm() / truth[name].norm().clamp_min(1e-9)) for name in truth)


class Readers:
    """Reads a folder by each program, and says whether it is refused, or the update is that of the original folder."""

    def __init__(self, ask: Any, convert: Callable[..., bool], base: Path, scratch: Path) -> None:
        self.ask, self.convert, self.base, self.scratch = ask, convert, base, scratch
        self.seen: dict[str, Any] = {}

    def peft(self, folder: Path, original: Path) -> str:
        return said(error(updates(self.base, folder), updates(self.base, original)) < 1e-5)

    def vllm(self, folder: Path, original: Path, rank: int = 8) -> str:
        out = self.scratch / "vllm"
        self.seen = self.ask("vllm", folder, out, rank)
        if "refused" in self.seen:
            return "refused"
        return said(error(load_file(out), updates(self.base, original)) < 1e-5)

    def sglang(self, folder: Path, original: Path, rank: int = 8) -> str:
        out = self.scratch / "sglang"
        self.seen = self.ask("sglang", folder, out, rank, self.base)
        if "refused" in self.seen:
            return "refused"
        model = LlamaForCausalLM.from_pretrained(self.base)
        return said(error(load_file(out), stacked(updates(self.base, original), model)) < 1e-5)

    def llama_cpp(self, folder: Path, original: Path) -> str:
        """By log-probabilities, since llama.cpp has no update to look at."""
        model, adapter, out = (self.scratch / name for name in ("base.gguf", "adapter.gguf", "logits"))
        to = ("--outtype", "f32", "--outfile")
        assert model.exists() or self.convert("convert_hf_to_gguf.py", self.base, *to, model)
        if not self.convert("convert_lora_to_gguf.py", folder, "--base", self.base, *to, adapter):
            return "refused"
        self.seen = self.ask("llama_cpp", model, adapter, out, TOKENS)
        found = load_file(out)["logits"].log_softmax(-1)
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(self.base), str(original)).eval()
        with torch.no_grad():
            truth = adapted(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
        self.seen["difference"] = float((found - truth).abs().max())
        return said(self.seen["difference"] < 1e-3)


def said(right: bool) -> str:
    return "right" if right else "wrong"


@pytest.fixture
def readers(ask: Any, convert: Callable[..., bool], base: Path, tmp_path: Path) -> Readers:
    return Readers(ask, convert, base, tmp_path)


# What each program makes of a folder. "raw" is PEFT's own, the others are targets of pedyra export.
FORMS = {
    "peft": {"raw": "right", "peft": "right", "padded": "right", "gguf": "right"},
    "vllm": {"raw": "right", "peft": "right", "padded": "right", "gguf": "right"},
    "sglang": {"raw": "refused", "peft": "refused", "padded": "right", "gguf": "refused"},
    "llama_cpp": {"raw": "wrong", "peft": "wrong", "padded": "right", "gguf": "right"},
}


@pytest.mark.parametrize("name", FORMS)
def test_layers_of_several_ranks_and_scalings(name: str, readers: Readers, adapter: Any, tmp_path: Path):
    original = adapter(**MIXED)
    folders = {form: export_adapter(original, form, tmp_path / form) for form in ("peft", "padded", "gguf")}
    found = {form: getattr(readers, name)(folder, original) for form, folder in {"raw": original, **folders}.items()}
    assert found == FORMS[name]
    place = destination(name.replace("_", "."))
    assert found[place.form] == "right" and place.mixed == (found["peft"] != "refused")
    assert (place.reads == "patterns") == (found["raw"] == "right")


@pytest.mark.parametrize("name", FORMS)
def test_rslora(name: str, readers: Readers, adapter: Any, tmp_path: Path):
    """Its scaling is alpha / sqrt(r); a reader that does not know it is off by sqrt(r), and gives no error."""
    original = adapter(use_rslora=True)
    place = destination(name.replace("_", "."))
    assert getattr(readers, name)(original, original) == ("right" if place.rslora else "wrong")
    assert getattr(readers, name)(export_adapter(original, place.form, tmp_path / "out"), original) == "right"


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True, "init_lora_weights": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("name", ["vllm", "llama_cpp", "sglang"])
@pytest.mark.parametrize("field", REFUSED)
def test_what_is_refused_is_in_the_table(name: str, field: str, readers: Readers, adapter: Any):
    """What a program refuses, or leaves out without a word, pedyra refuses for it, with a repair."""
    folder = adapter(**REFUSED[field])
    place = destination(name.replace("_", "."))
    if getattr(readers, name)(folder, folder) != "right":
        assert any(field in each for each in place.refused_for(read_lora(folder)))


def test_vllm_takes_no_rank_above_its_own_and_reads_a_classifier(readers: Readers, adapter: Any):
    folder = adapter(r=16)
    assert readers.vllm(folder, folder, rank=8) == "refused" and readers.vllm(folder, folder, rank=16) == "right"


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Trainer, Path]:
    """A Trainer of a BERT classifier whose LoRA, pooler and all, does much, and the folder of its base, which has no
    head."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes["num_labels"] = 3
    model: Any = BertForSequenceClassification(
        BertConfig(vocab_size=32, **sizes, max_position_embeddings=32, initializer_range=0.2)
    )
    model.bert.save_pretrained(tmp_path / "embedder")
    model.name_or_path = str(tmp_path / "embedder")
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", init_lora_weights=False
    )
    model = get_peft_model(model, lora)
    model.base_model.classifier.modules_to_save["default"].weight.data.normal_()
    rows = [{"input_ids": torch.randint(0, 32, (6,)), "labels": n % 3} for n in range(96)]
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", label_names=["labels"])
    return Trainer(model, arguments, eval_dataset=rows), tmp_path / "embedder"  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:there are .* batches of held-out rows:UserWarning")
def test_vllm_says_of_a_classifier_what_was_proved(classifier: Any, ask: Any, tmp_path: Path):
    """vLLM's own class of the model, by the lines that are printed, on the folder that a fit has written."""
    trainer, embedder = classifier
    fit = pedyra.fit(trainer, for_="vllm:8", rows=48)
    folder = fit.save(tmp_path / "small")
    prepare, serve = (shlex.split(line) for line in destination("vllm").commands({"small": read_lora(folder)}))
    subprocess.run([sys.executable, *prepare[1:]], cwd=tmp_path, check=True, capture_output=True)
    base, out = tmp_path / serve[2], tmp_path / "logits"
    modules = serve[serve.index("--lora-target-modules") + 1 : serve.index("--lora-modules")]
    rank = int(serve[serve.index("--max-lora-rank") + 1])

    def logits(adapter: Path) -> Tensor:
        model: Any = BertForSequenceClassification.from_pretrained(base)
        with torch.no_grad():
            return PeftModel.from_pretrained(model, str(adapter)).eval()(torch.tensor([TOKENS[:6]]) % 32).logits[0]

    tokens = [token % 32 for token in TOKENS[:6]]
    seen = ask("vllm", folder, out, rank, base, modules, tokens)
    assert seen["class"] == "BertForSequenceClassification", seen
    torch.testing.assert_close(load_file(out)["logits"], logits(folder), rtol=1e-4, atol=1e-4)
    # The whole adapter is read without an error, and is another model there.
    trainer.model.save_pretrained(tmp_path / "whole")
    seen = ask("vllm", tmp_path / "whole", out, rank, base, modules, tokens)
    names = [layer.name for layer in read_lora(tmp_path / "whole").layers]
    assert seen["dropped"] == destination("vllm").dropped(names) == ["bert.pooler.dense"]
    assert (load_file(out)["logits"] - logits(tmp_path / "whole")).abs().max() > 0.1
    # Neither the base as it is nor the end of the pooler's name would do.
    assert "classification head" in ask("vllm", folder, out, rank, embedder, None, tokens)["refused"]
    assert (
        "could not be wrapped" in ask("vllm", folder, out, rank, base, ["query", "value", "dense"], tokens)["refused"]
    )


def test_sglang_reserves_what_is_told_and_takes_no_rank_above_its_own(readers: Readers, adapter: Any, base: Path):
    folder = adapter(r=4)
    assert readers.sglang(folder, folder, rank=8) == "right"
    model: Any = LlamaForCausalLM.from_pretrained(base)
    widths = [
        (module.in_features, module.out_features) for name, module in model.named_modules() if name.endswith("_proj")
    ]
    assert readers.seen["reserved"] * 2 == destination("sglang").slot_bytes(widths, 8)
    assert readers.sglang(folder, folder, rank=2) == "refused"


@pytest.mark.parametrize("module", ["q_proj", "v_proj"])
def test_sglang_takes_no_query_without_a_value(module: str, readers: Readers, adapter: Any):
    folder = adapter(target_modules=[module, "o_proj"])
    assert readers.sglang(folder, folder) == "refused"
    assert module in destination("sglang").together


def test_a_tensor_of_an_embedding_that_was_resized(readers: Readers, adapter: Any, tmp_path: Path, base: Path):
    """PEFT saves it beside the factors, where no field tells of it."""
    folder = adapter()
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder))
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    for name in ("vllm", "llama_cpp"):
        assert getattr(readers, name)(tmp_path / "with", folder) == "refused"
        assert destination(name.replace("_", ".")).refused_for(read_lora(tmp_path / "with"))

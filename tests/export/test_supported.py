"""Every kind of LoRA under every verb: what is taken gives the logits of the live model, and the rest is refused with
the name of the kind, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pedyra import export_adapter
from pedyra.export.merge import write_merged
from pedyra.fitting.calibration import lora_layers
from pedyra.fitting.cut import write_cut
from pedyra.lora.attach import attach
from pedyra.lora.folder import read_lora
from pedyra.lora.layer import adapted_layers
from pedyra.lora.supported import KINDS, check_supported

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's of tied weights, of biases and of its experiments
]

VERBS = ("adapt", "fit", "peft", "padded", "gguf", "merged")
# A letter a verb, in this order: y(es), n(o), or - where the test has no model that the verb could take.
TAKEN = {
    "AdaLoRA and others that are no LoRA": "nnnnnn",
    "LoRA": "yyyyyy",
    "rsLoRA": "yyyyyy",
    "EVA, orthogonal, Gaussian": "yyyyyy",
    "DoRA": "yyynny",
    "PiSSA, OLoRA": "ynnnny",
    "PiSSA by a fast SVD, CorDA, LoRA-GA, or a start that is unknown here": "ynnnnn",
    "LoftQ": "nnnnnn",
    "MiCA": "nyyyyy",
    "aLoRA, Arrow, QA-LoRA, BD-LoRA, KaSA, MonteCLoRA, VeLoRA": "nnnnnn",
    "experts": "nnnnny",
    "embedding": "nnyyny",
    "convolution": "nnyyny",
    "MultiheadAttention": "nn----",
    "unknown layer": "nn----",
    "biases": "yyyyny",
    "heads": "yyyyny",
    "trained tokens": "yyyyny",
    "other tensors": "yyyyny",
}


def test_every_kind_stands_in_this_table():
    assert [kind.name for kind in KINDS] == [*TAKEN]
    assert {kind.name: [*kind.refused] for kind in KINDS} == {
        name: [verb for verb, taken in zip(VERBS, letters, strict=True) if taken == "n"]
        for name, letters in TAKEN.items()
    }


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral() -> Any:
    shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))  # type: ignore[arg-type]


def vit() -> Any:
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=8, patch_size=4))


def bert() -> Any:
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **shape))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


@dataclass
class Case:
    """A model with an adapter of one kind."""

    base: Callable[[], Any] = llama
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    settings: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    """What the config is made to say after the model was made, of kinds that cannot be made in a test."""
    saved: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        torch.manual_seed(0)
        base = self.base()
        torch.manual_seed(1)
        made: Any = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": self.targets, **self.settings}))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "lora_" in name and "init_lora_weights" not in self.settings:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif parameter.requires_grad:
                    parameter.mul_(1.5)
        for name, value in self.said.items():
            setattr(made.peft_config["default"], name, value)
        return made.eval()

    def logits(self, model: Any) -> Tensor:
        inputs = torch.linspace(0, 1, 192).reshape(1, 3, 8, 8) if self.base is vit else torch.arange(1, 7)[None]
        with torch.no_grad():
            return model.eval()(inputs).logits


class AdaLora(Case):
    def model(self) -> Any:
        settings = AdaLoraConfig(init_r=2, target_r=1, target_modules=self.targets, total_step=10, tinit=1, tfinal=1)
        return get_peft_model(self.base(), settings)


class UnknownLayer(Case):
    def model(self) -> Any:
        class Slot(nn.Linear):
            pass

        made = super().model()
        module = made.get_base_model().model.layers[0].self_attn.v_proj
        module.lora_A["default"].__class__ = Slot
        return made


CASES: dict[str, Case] = {
    "AdaLoRA and others that are no LoRA": AdaLora(),
    "LoRA": Case(),
    "rsLoRA": Case(settings={"use_rslora": True}),
    "EVA, orthogonal, Gaussian": Case(settings={"init_lora_weights": "orthogonal"}),
    "DoRA": Case(settings={"use_dora": True}),
    "PiSSA, OLoRA": Case(settings={"init_lora_weights": "pissa"}),
    "PiSSA by a fast SVD, CorDA, LoRA-GA, or a start that is unknown here": Case(
        settings={"init_lora_weights": "pissa_niter_4"}
    ),
    "LoftQ": Case(said={"init_lora_weights": "loftq"}),
    "MiCA": Case(settings={"init_lora_weights": "mica"}),
    "aLoRA, Arrow, QA-LoRA, BD-LoRA, KaSA, MonteCLoRA, VeLoRA": Case(settings={"kasa_config": KasaConfig()}),
    "experts": Case(mixtral, [], {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "embedding": Case(targets=["embed_tokens"]),
    "convolution": Case(vit, ["projection"]),
    "MultiheadAttention": Case(Attention, ["attention"]),
    "unknown layer": UnknownLayer(),
    "biases": Case(bert, ["query", "key"], {"bias": "lora_only"}),
    "heads": Case(bert, ["query"], {"modules_to_save": ["classifier"]}),
    "trained tokens": Case(settings={"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    "other tensors": Case(saved={"save_embedding_layers": True}),
}


def used(verb: str, case: Case, model: Any, scratch: Path) -> Any:
    """What the verb makes of the model: one that has to give the same logits."""
    if verb == "adapt":
        attach(model)
        return model
    if verb == "fit":
        lora_layers(model)
    saved = scratch / "adapter"
    model.save_pretrained(saved, **case.saved)
    torch.manual_seed(0)
    base = case.base()
    if verb == "merged":
        lora = read_lora(saved)
        lora.check_supported("merged")
        write_merged(base, None, lora, scratch / "out")
        return type(base).from_pretrained(scratch / "out")
    if verb == "fit":
        lora = read_lora(saved)
        lora.check_supported("fit")
        factors = {layer.name: (lora.tensors[layer.keys["A"]], lora.tensors[layer.keys["B"]]) for layer in lora.layers}
        write_cut(lora, factors, scratch / "out", {})
    else:
        export_adapter(saved, verb, scratch / "out")
    return PeftModel.from_pretrained(base, scratch / "out")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", list(TAKEN))
def test_a_verb_takes_a_kind_or_says_why_not(name: str, verb: str, tmp_path: Path):
    taken, case = TAKEN[name][VERBS.index(verb)], CASES[name]
    if taken == "-":
        pytest.skip("no model of this kind can be saved")
    model = case.model()
    if taken == "y":
        expected = case.logits(model)
        torch.testing.assert_close(case.logits(used(verb, case, model, tmp_path)), expected, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(ValueError, match="cannot be") as refusal:
        used(verb, case, model, tmp_path)
    said = str(refusal.value)
    assert name in said and "; " in said and "\n" not in said and "{" not in said
    assert not (tmp_path / "out").exists()
    assert adapted_layers(model) == []


@pytest.mark.parametrize("verb", VERBS)
def test_attention_alone_of_a_model_with_experts_is_a_plain_lora(verb: str, tmp_path: Path):
    """PEFT itself gives the live config of such a model an empty set as target_parameters."""
    case = Case(mixtral)
    model = case.model()
    check_supported(verb, "adapter", model.peft_config["default"].to_dict())
    expected = case.logits(model)
    torch.testing.assert_close(case.logits(used(verb, case, model, tmp_path)), expected, atol=1e-5, rtol=1e-5)

"""EVA: the budget is spent, A holds principal components of the inputs, and the function does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import T5Config, T5ForConditionalGeneration

from pedyra.methods.eva import _check_layers, counted
from pedyra.methods.method import Request
from pedyra.methods.registry import get_method

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def test_ranks_spend_the_budget_and_a_has_orthonormal_rows(prepare: Any):
    run = prepare("eva", lora={"exclude_modules": ["bert.pooler.dense"]})
    layers: list[Any] = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert sum(layer.r["default"] for layer in layers) == 12 * 4
    assert max(layer.r["default"] for layer in layers) <= 8  # rho r
    for layer in layers:
        A = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
        assert layer.scaling["default"] == 32 / 4
        assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (
            "classification",
            {"lora": {"r": 200}},
            "a batch has .* vectors for .*self.query, but EVA needs 400",
        ),
        # Four tokens a row are enough for every layer but the pooler, which sees the first of them.
        (
            "classification",
            {"training": {"per_device_train_batch_size": 4}},
            "a batch has 4 vectors for bert.pooler.dense, but EVA needs 8",
        ),
        (
            "classification",
            {"training": {"per_device_train_batch_size": 48}, "lora": {"r": 40}},
            "the inputs of bert.encoder.layer.0.attention.self.query have .* components, but EVA looks for 80",
        ),
        # A prompt is long, but EVA looks at the tokens of the answer alone.
        (
            "causal_lm",
            {"lora": {"r": 40}},
            "a batch has .* vectors for .*q_proj, but EVA needs 80",
        ),
    ],
)
def test_a_batch_with_too_few_vectors_is_told_instead_of_waiting_for_ever(
    prepare: Any, kind: str, sections: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        prepare("eva", kind, **sections)


def test_deberta_whose_projections_see_position_embeddings_too(prepare: Any, capsys: pytest.CaptureFixture[str]):
    batch = {"per_device_train_batch_size": 48}
    run = prepare("eva", model={"name": "tiny-deberta"}, lora={"target_modules": ["query_proj"]}, training=batch)
    layers: list[Any] = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert layers and sum(layer.r["default"] for layer in layers) == 4 * len(layers)
    for layer in layers:
        A = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
    assert "skipping SVD" not in capsys.readouterr().out


def test_a_layer_that_sees_position_embeddings_alone_is_named_instead_of_waiting_for_ever():
    class Places(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.words(x) + self.places(torch.ones(1, 6, 8)).mean(1, keepdim=True)

    model: Any = get_peft_model(Places(), LoraConfig(target_modules=["words", "places"]))  # type: ignore[arg-type]
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="^places sees no input of a row"):
        _check_layers(model, lambda: model(x=torch.randn(2, 3, 8)), lambda x: len(counted(x, mask)), needed=4)


def test_the_vectors_that_count():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(12.0).view(2, 3, 2)
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]])
    assert same_bits(counted(x, mask), expected)
    assert same_bits(counted(x.view(6, 2), mask), expected)  # all rows in one
    assert same_bits(counted(x[:, 0], mask), x[:, 0])  # one a row
    assert counted(torch.ones(1, 9, 2), mask).shape == (0, 2)  # of no row
    assert counted(x, None).shape == (6, 2)


def test_a_layer_that_takes_no_part_is_named():
    class Spare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model: Any = get_peft_model(Spare(), LoraConfig(target_modules=["used", "spare"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^spare sees no input of a row in the forward pass"):
        _check_layers(model, lambda: model(x=torch.randn(4, 8)), len, needed=4)


@pytest.mark.parametrize(("field", "value"), [("init", "gaussian"), ("use_rslora", True)])
def test_another_start_or_scaling_is_refused(prepare: Any, field: str, value: Any):
    with pytest.raises(ValueError, match=f"lora.{field} is {value!r}, but EVA is a start of its own"):
        prepare("eva", lora={field: value})


def test_all_factors_train_in_float32_on_a_base_in_bfloat16(prepare: Any):
    run = prepare("eva", model={"dtype": "bfloat16"}, lora={"exclude_modules": ["bert.pooler.dense"]})
    layers: list[Any] = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert len({layer.r["default"] for layer in layers}) > 1  # some were made anew
    assert {p.dtype for name, p in run.model.named_parameters() if "lora_" in name} == {torch.float32}


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    base, lora = T5ForConditionalGeneration(config), LoraConfig(target_modules=["q"])
    with pytest.raises(ValueError, match="the base model is an encoder-decoder, but EVA"):
        get_method("eva").prepare(Request(method="eva", model=base, lora=lora))

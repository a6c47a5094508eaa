"""GoRA: ranks by hand, a start that is a step down the gradient, and little of the gradient kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from pedyra.app.runs.setup import request
from pedyra.methods import gora
from pedyra.methods.data import Data, model_loss
from pedyra.methods.gora import observe, ranks_of, start_of_b


def layers_of(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def test_ranks_by_hand():
    widths = {"a": 10, "b": 10, "c": 20}  # in + out; budget 4 * 40 = 160 parameters
    importance = {"a": 0.03, "b": 0.05, "c": 0.12}  # shares 0.15, 0.25, 0.6 -> 24, 40, 96 parameters
    assert ranks_of(importance, widths, r=4, min_rank=1, max_rank=16) == {"a": 2, "b": 4, "c": 4}
    assert ranks_of(importance, widths, r=4, min_rank=3, max_rank=4) == {"a": 3, "b": 4, "c": 4}


def test_the_start_is_minus_the_projected_gradient():
    generator = torch.Generator().manual_seed(0)
    G, A = torch.randn(6, 9, generator=generator), torch.randn(3, 9, generator=generator)
    projection = A.T @ torch.linalg.inv(A @ A.T) @ A
    B = start_of_b(G @ A.T, A, eta=0.05, scaling=2.0)
    torch.testing.assert_close(2.0 * B @ A, -0.05 * (9 / 3) ** 0.5 * G @ projection, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [256 << 20, 1])  # in one group, or one layer at a time
def test_what_is_kept_is_that_of_the_averaged_dense_gradient(make_recipe: Any, make_base: Any, memory: int):
    recipe = make_recipe("gora")
    base, task, _ = make_base(recipe)
    wanted = request(recipe, base, task)
    data = wanted.data
    assert data is not None
    model = wanted.with_lora(r=16)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    observed = observe(model, data, seed=0, steps=3, memory=memory)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
    for layer in layers_of(model).values():
        layer.get_base_layer().weight.requires_grad_(True)
    for _, batch in zip(range(3), data.batches(), strict=False):
        (model(**batch).loss / 3).backward()
    for name, layer in layers_of(model).items():
        weight = layer.get_base_layer().weight
        expected = float((weight.detach() * weight.grad).abs().mean())
        assert observed[name].importance == pytest.approx(expected, rel=1e-4)
        expected = weight.grad @ observed[name].A.T
        torch.testing.assert_close(observed[name].gradient_of_A, expected, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_a_layer_that_holds_its_weight_transposed():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = LoraConfig(r=3, target_modules=["attn.c_attn", "attn.c_proj"], fan_in_fan_out=True)
    model: Any = get_peft_model(base, config)
    tokens = torch.randint(11, (4, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    data = Data(batches=lambda: iter([batch]), loss=model_loss)
    observed = observe(model, data, seed=0, steps=1)
    layers = layers_of(model)
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, layer in layers.items():
        gradient = layer.get_base_layer().weight.grad.T  # (out, in)
        torch.testing.assert_close(observed[name].gradient_of_A, gradient @ observed[name].A.T, rtol=1e-3, atol=1e-6)


class Spare(torch.nn.Module):
    """Its second layer takes no part in the loss."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = (torch.nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=self.used(x).float().square().mean())


def _observed(base: torch.nn.Module, x: torch.Tensor) -> Any:
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["used", "spare"]))  # type: ignore[arg-type]
    data = Data(batches=lambda: iter(x.split(4)), loss=lambda model, batch: model(batch).loss)
    return observe(model, data, seed=0, steps=len(x) // 4)


def test_a_layer_that_takes_no_part_in_the_loss_has_no_importance():
    observed = _observed(Spare(), torch.randn(4, 8))
    assert observed["spare"].importance == 0 and observed["used"].importance > 0


def test_many_small_gradients_in_bfloat16_add_up():
    x = torch.randn(4 * 64, 8).bfloat16()
    observed = _observed(Spare(torch.bfloat16), x)["used"]
    base = Spare(torch.bfloat16).used
    base.weight.requires_grad_()
    total = torch.zeros(8, 8)
    for part in x.split(4):
        total += torch.autograd.grad(base(part).float().square().mean(), base.weight)[0].float()
    torch.testing.assert_close(observed.gradient_of_A, (total / 64) @ observed.A.float().T, rtol=1e-4, atol=1e-5)


def test_a_group_never_holds_more_than_the_limit():
    class Layer:
        def __init__(self, numel: int) -> None:
            self.weight = torch.zeros(numel)

        def get_base_layer(self) -> Any:
            return self

    layers = [(str(n), Layer(n)) for n in (10, 10, 30, 5, 5, 5)]
    assert [[name for name, _ in group] for group in gora._groups(layers, 80)] == [
        ["10", "10"],
        ["30"],
        ["5", "5", "5"],
    ]


def test_the_start_lowers_the_loss_and_the_scaling_is_rank_stabilised(prepare: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pedyra.methods.gora.ETA", 1e-2)
    run = prepare("gora")
    started = layers_of(run.model)
    assert {layer.r["default"] for layer in started.values()} <= set(range(2, 17))
    for layer in started.values():
        assert layer.scaling["default"] == pytest.approx(32 / layer.r["default"] ** 0.5)
    batch = run.batch(48)
    run.model.eval()
    with torch.no_grad():
        after = run.model(**batch).loss
        with run.model.disable_adapter():
            before = run.model(**batch).loss
    assert after < before


def test_a_and_b_both_learn_at_the_first_step(prepare: Any):
    assert all(bool(gradient.any()) for gradient in prepare("gora").gradients().values())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"use_dora": True}}, "lora.use_dora is True, but GoRA defines its own start"),
        (
            {"lora": {"target_modules": ["query", "word_embeddings"]}},
            "word_embeddings is a LoRA layer of kind Embedding",
        ),
        ({"method_settings": {"min_rank": 5}}, "min_rank 5 and max_rank 16 must enclose lora.r 4"),
        ({"method_settings": {"min_rank": 0}}, "method_settings.min_rank is 0; it must be at least 1"),
    ],
)
def test_what_it_cannot_do_is_told(prepare: Any, sections: Any, message: str):
    with pytest.raises(ValueError, match=message):
        prepare("gora", **sections)


def batches_with(broken: list[int]) -> Data:
    """Three batches of one model, of which these have a loss that is not a number."""
    torch.manual_seed(1)
    rows = [{"input_ids": torch.randint(11, (4, 8)), "index": index} for index in range(3)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        found = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        return found * float("nan") if batch["index"] in broken else found

    return Data(batches=lambda: iter(rows), loss=loss)


def small_gpt2() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, **sizes))
    return get_peft_model(base, LoraConfig(r=3, target_modules=["attn.c_attn"], fan_in_fan_out=True))


def test_a_batch_whose_loss_is_not_finite_is_left_out():
    data = batches_with([1])
    found = observe(small_gpt2(), data, seed=0, steps=3)
    left = [row for row in data.batches() if row["index"] != 1]
    expected = observe(small_gpt2(), Data(batches=lambda: iter(left), loss=data.loss), seed=0, steps=2)
    assert found and found.keys() == expected.keys()
    for name, layer in found.items():
        torch.testing.assert_close(layer.gradient_of_A, expected[name].gradient_of_A)


def test_no_batch_with_a_finite_loss_is_an_error():
    with pytest.raises(ValueError, match="none of 3 batches has a finite loss.*rows without labels"):
        observe(small_gpt2(), batches_with([0, 1, 2]), seed=0, steps=3)

"""A calibration against autograd and against a loop, on a tiny BERT with padded rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from closeness import close, same_bits
from torch import Tensor

from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.judge import Judge, model_loss
from pedyra.fitting.modes import disabled, evaluating


@pytest.fixture
def model(trained_bert: Any) -> Any:
    return trained_bert


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def batch(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 40, (rows, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 0] > 20).long()}

    return [batch(rows) for rows in (6, 6, 3)]


def test_slopes_are_the_gradient_of_gates_in_the_balanced_basis(model, batches):
    found = calibrate(Judge(model), batches)
    name = next(key for key in found.layers if key.endswith("layer.1.output.dense"))
    slot, basis = lora_layers(model)[name].lora_A["default"], found.layers[name].basis
    model.eval()
    for index, batch in enumerate(batches):
        z = torch.ones(4, requires_grad=True)
        M = basis.inverse.float() @ torch.diag(z) @ basis.T.float()
        handle = slot.register_forward_hook(lambda module, args, h, M=M: h @ M.T)
        (gradient,) = torch.autograd.grad(model_loss(model, batch), z)
        handle.remove()
        torch.testing.assert_close(found.layers[name].slopes[index].float(), gradient, rtol=1e-3, atol=1e-6)


def test_the_gramians_are_those_of_a_loop_over_tokens(model, batches):
    found = calibrate(Judge(model), batches)
    name = next(key for key in found.layers if key.endswith("layer.0.intermediate.dense"))
    slot = lora_layers(model)[name].lora_A["default"]
    model.eval()
    P, Q, tokens = torch.zeros(4, 4), torch.zeros(4, 4), 0
    for batch in batches:
        seen: list[Tensor] = []
        handle = slot.register_forward_hook(lambda module, args, h, seen=seen: seen.append(h))
        loss = model_loss(model, batch)
        handle.remove()
        (g,) = torch.autograd.grad(loss * len(batch["labels"]), seen[0])
        for h_row, g_row, used in zip(seen[0], g, batch["attention_mask"], strict=True):
            for h_token, g_token, on in zip(h_row.detach(), g_row, used, strict=True):
                if on:  # a padded token has no gradient
                    P, Q, tokens = P + h_token.outer(h_token), Q + g_token.outer(g_token), tokens + 1
    expected = torch.linalg.eigvals((P / tokens).double() @ (Q / tokens).double()).real.sort(descending=True).values
    torch.testing.assert_close(found.layers[name].basis.values.square(), expected, rtol=2e-2, atol=1e-9)


def test_nothing_of_the_model_changes(model, batches):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    calibrate(Judge(model), batches)
    assert all(same_bits(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(layer.lora_A["default"]._forward_hooks for layer in lora_layers(model).values())


def test_a_batch_that_is_not_finite_is_left_out_and_counted(model, batches):
    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        return model_loss(model, batch) * (float("nan") if len(batch["labels"]) == 3 else 1)

    whole, part = calibrate(Judge(model, loss), batches), calibrate(Judge(model), batches[:2])
    assert len(whole.samples) == 2
    for name, layer in part.layers.items():
        torch.testing.assert_close(whole.layers[name].slopes, layer.slopes)
        torch.testing.assert_close(whole.layers[name].basis.values, layer.basis.values)
    with pytest.raises(ValueError, match="1 of 1 calibration batches have a finite loss, and it takes two"):
        calibrate(Judge(model), batches[:1])


def test_a_base_that_a_loss_compares_with_stays_the_base(model, batches):
    """The reference of DPO disables the adapter itself, and enables it again, whoever had disabled it before."""
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    with torch.no_grad(), model.eval().disable_adapter():
        none = model(**inputs).logits
    with torch.no_grad(), disabled(model):
        with model.disable_adapter():
            pass
        assert close(model(**inputs).logits, none)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, none, atol=1e-4)


def test_a_layer_that_something_bypasses_is_told(model, batches):
    name, layer = next(iter(lora_layers(model).items()))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + layer.scaling["default"] * (x @ A.T) @ B.T

    layer.forward = forward
    with pytest.raises(ValueError, match=f"saw no token in {name}.*pedyra fit FOLDER"):
        calibrate(Judge(model), batches)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()  # it does nothing: nothing is lost without it
    calibrate(Judge(model), batches)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.lora_A["default"].weight.zero_()  # as triples are whose E is zero
    calibrate(Judge(model), batches)


def test_a_layer_that_no_gradient_reaches_is_told(model, batches):
    name = "bert.encoder.layer.1.intermediate.dense"
    lora_layers(model)[name].register_forward_hook(lambda module, args, y: y.detach())
    with pytest.raises(ValueError, match=f"no gradient reached {name}"):
        calibrate(Judge(model), batches)


def test_checkpointed_activations_change_nothing(model, batches, checkpoint_activations):
    expected = calibrate(Judge(model), batches)
    checkpoint_activations(model, False)
    model.train()
    ran: list[bool] = []
    layer = model.get_base_model().bert.encoder.layer[0]
    layer.attention.self.query.lora_A["default"].register_forward_hook(lambda *call: ran.append(True))
    found = calibrate(Judge(model), batches)
    assert len(ran) == 2 * len(batches)  # forward, and again in the backward pass
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].basis.values, layer.basis.values, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.layers[name].slopes.abs(), layer.slopes.abs(), rtol=1e-3, atol=1e-6)


def test_a_model_in_evaluation_mode_checkpoints_what_it_was_told_to(model, batches, checkpoint_activations):
    """Its user's Trainer is put in this mode before the calibration, which must not take more memory for it."""
    checkpoint_activations(model, False)
    model.train()
    layer = model.get_base_model().bert.encoder.layer[0]
    with evaluating(model):
        assert not layer.training
        with evaluating(model, checkpointing=True):
            assert layer.training and not layer.attention.self.query.training
        assert not layer.training

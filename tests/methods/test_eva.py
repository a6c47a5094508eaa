"""EVA: the budget is spent, A holds principal components of the inputs, and the function does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

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


def test_a_batch_with_too_few_tokens_is_told(prepare: Any):
    with pytest.raises(ValueError, match="a batch has .* tokens, but EVA needs 400"):
        prepare("eva", method_settings={"rho": 100})


def test_another_start_is_refused(prepare: Any):
    with pytest.raises(ValueError, match="lora.init is 'gaussian', but EVA is a start of its own"):
        prepare("eva", lora={"init": "gaussian"})

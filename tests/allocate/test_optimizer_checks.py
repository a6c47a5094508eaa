"""Optimizers whose state cannot follow a rank change are refused, with the repair, before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import check_optimizer, check_state, unwrapped
from pedyra.lora.resize import Replacement


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.Adafactor([p]), "Adafactor"),
        (lambda p: transformers.Adafactor([p]), "Adafactor"),
        (lambda p: torch.optim.Muon([p]), "Muon"),
        (lambda p: torch.optim.LBFGS([p]), "LBFGS"),
    ],
    ids=["torch-adafactor", "transformers-adafactor", "muon", "lbfgs"],
)
def test_state_that_is_not_row_wise_is_refused_with_the_repair(make, name):
    with pytest.raises(ValueError, match=f"{name} .*cannot follow a rank change; use optim=.adamw_torch"):
        check_optimizer(make(matrix()))


def test_a_subclass_of_a_refused_optimizer_is_refused_too():
    class Mine(torch.optim.Adafactor):
        pass

    with pytest.raises(ValueError, match="cannot follow a rank change"):
        check_optimizer(Mine([matrix()]))


def test_torchaos_packed_averages_are_refused():
    made = type("AdamW8bit", (torch.optim.SGD,), {"__module__": "torchao.optim.adam"})([matrix()], lr=0.1)
    with pytest.raises(ValueError, match="AdamW8bit of torchao .*cannot follow a rank change; use optim="):
        check_optimizer(made)


class Factored(Optimizer):
    """An optimizer nobody has heard of, with one statistic per row and one per column."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"row": parameter.grad.mean(1), "column": parameter.grad.mean(0)}


def test_unknown_state_of_another_shape_is_refused_before_anything_moves():
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = Factored([parameter])
    parameter.grad = torch.randn(3, 2)
    optimizer.step()
    first = Replacement(parameter, nn.Parameter(parameter[:1].detach()), 0, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"Factored keeps 'row' of shape \(3,\) .*use optim=.adamw_torch"):
        check_state(optimizer, [first.old])
    assert optimizer.param_groups[0]["params"] == [parameter] and parameter in optimizer.state


def test_accelerates_wrapper_is_looked_through():
    from accelerate import Accelerator

    inner = torch.optim.AdamW([matrix()])
    assert unwrapped(Accelerator(cpu=True).prepare_optimizer(inner)) is inner and unwrapped(inner) is inner


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch uses it itself
def test_state_that_other_processes_hold_is_refused(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer([matrix()], torch.optim.AdamW)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer .*cannot follow a rank change; use optim="):
            check_optimizer(optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_goes_up_is_refused():
    with pytest.raises(ValueError, match="AdamW has maximize=True.*minimise the negative"):
        check_optimizer(torch.optim.AdamW([matrix()], maximize=True))

"""Optimizers whose state cannot follow a rank change are refused by what they are, with the repair."""

from __future__ import annotations

from collections.abc import Callable

import peft.optimizers
import pytest
import torch
import transformers
from torch import nn

from pedyra.allocate.optimizer_state import check_optimizer, unwrapped


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 4))


class Mine(torch.optim.Adafactor):
    """A subclass of one that is refused."""


OF_TORCHAO = type("AdamW8bit", (torch.optim.SGD,), {"__module__": "torchao.optim.adam"})
CANNOT = ".*cannot follow a rank change; use optim=.adamw_torch"
REFUSED: dict[str, tuple[Callable[[nn.Parameter], torch.optim.Optimizer], str]] = {
    "torch's Adafactor": (lambda p: torch.optim.Adafactor([p]), f"Adafactor {CANNOT}"),
    "transformers' Adafactor": (lambda p: transformers.Adafactor([p]), f"Adafactor {CANNOT}"),
    "a subclass": (lambda p: Mine([p]), f"Mine {CANNOT}"),
    "Muon": (lambda p: torch.optim.Muon([p]), f"Muon {CANNOT}"),
    "LBFGS": (lambda p: torch.optim.LBFGS([p]), f"LBFGS {CANNOT}"),
    "torchao's packed averages": (lambda p: OF_TORCHAO([p], lr=0.1), f"AdamW8bit of torchao {CANNOT}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_follow_is_refused_with_the_repair(case):
    make, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        check_optimizer(make(matrix()))


def test_an_optimizer_that_knows_its_first_pairs_alone_is_refused(make_bert):
    if not hasattr(peft.optimizers, "create_riemannian_optimizer"):
        pytest.skip("this peft has no such optimizer")
    optimizer = peft.optimizers.create_riemannian_optimizer(make_bert(), torch.optim.AdamW, lr=1e-2)
    with pytest.raises(ValueError, match=f"RiemannianPre{CANNOT}"):
        check_optimizer(optimizer)


def test_accelerates_wrapper_is_looked_through():
    from accelerate import Accelerator

    inner = torch.optim.AdamW([matrix()])
    assert unwrapped(Accelerator(cpu=True).prepare_optimizer(inner)) is inner and unwrapped(inner) is inner


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch uses it itself
def test_state_that_other_processes_hold_is_refused(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=f"ZeroRedundancyOptimizer {CANNOT}"):
            check_optimizer(ZeroRedundancyOptimizer([matrix()], torch.optim.AdamW))
    finally:
        torch.distributed.destroy_process_group()

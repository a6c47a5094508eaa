"""One run of a method in the benchmarks' loop: equal batches, equal parameters, the ranks that are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.method_run import BenchTraining, FinishedRun, run_method
from benchmarks.spec import parse_method
from pedyra.methods.registry import METHODS

WIDTHS = {"q": 72, "up": 72}


class TwoLayers(nn.Module):
    """Width 32 with 40 hidden."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.q, self.up = nn.Linear(32, 40, bias=False), nn.Linear(40, 32, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.q(x)))


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(16, 32, generator=generator)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    target = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) / 6
    return (model(x) - x @ target).square().mean()


def run(text: str, *, rank: int = 2, steps: int = 40, lr: float = 1e-2, **changes: Any) -> FinishedRun:
    setting: dict[str, Any] = dict(base=TwoLayers(), layers=["q", "up"], loss=loss, batches=batches)
    return run_method(parse_method(text), BenchTraining(**setting, rank=rank, steps=steps, lr=lr, seed=0, **changes))


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' and PEFT's own
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("rasa", "qlora")])
def test_every_method_learns_within_the_budget(name: str):
    # rasa wants two layers of one type, qlora a quantised model.
    outcome = run("autolora:search_steps=3" if name == "autolora" else name, steps=60, lr=5e-2)
    x = torch.randn(64, 32)
    with torch.no_grad():
        assert not outcome.diverged and not outcome.model.training and loss(outcome.model, x) < loss(TwoLayers(), x)
    if name == "randlora":
        assert outcome.ranks is None
        return
    assert outcome.ranks is not None and list(outcome.ranks) == ["q", "up"]
    spent = sum(rank * WIDTHS[layer] for layer, rank in outcome.ranks.items())
    assert spent == outcome.parameters or name == "dora"
    assert spent <= 2 * 2 * 72


def test_lora_here_is_peft_lora():
    base: Any = TwoLayers()
    torch.manual_seed(0)
    expected: Any = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["q", "up"]))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([p for p in expected.parameters() if p.requires_grad])
    for step, x in zip(range(10), batches(), strict=False):
        loss(expected, x).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 10)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(7, 32)
    torch.testing.assert_close(run("lora", steps=10).model(x), expected(x), rtol=1e-4, atol=1e-5)


def test_lora_plus_moves_b_faster_by_its_ratio():
    def first_step(text: str) -> tuple[Tensor, Tensor]:
        base: Any = run(text, steps=1).model.get_base_model()
        return base.q.lora_A["default"].weight.detach(), base.q.lora_B["default"].weight.detach()

    (A, B), (A4, B4) = first_step("lora"), first_step("lora+:ratio=4")
    torch.testing.assert_close(A4, A)
    torch.testing.assert_close(B4, 4 * B)


def test_rank_settings_reach_the_method_or_are_refused():
    assert run("pedyra:moves=0").adjustments == 0 < run("pedyra:moves=1").adjustments
    with pytest.raises(ValueError, match="increlora has no use for budget, or is defined by 'ranks'|rank.budget is"):
        run("increlora:budget=parameters")


@pytest.mark.parametrize("name", ["lora", "sora", "dylora"])
def test_a_run_that_diverges_ends_at_the_budget_too(name: str):
    outcome = run(name, lr=1e30)
    assert outcome.ranks is not None and outcome.diverged and sum(outcome.ranks.values()) <= 4

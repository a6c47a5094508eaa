"""AutoLoRA: the hypergradient against exact derivatives, the rule for ranks, and a search that finds what is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra import AutoLora, adapt
from pedyra.app.runs.setup import begin_method
from pedyra.methods.autolora import WeighedB, hypergradient, rank_of, search
from pedyra.methods.slots import linear_slots
from pedyra.trainer.upcoming import total_steps, upcoming

ETA = 0.1


class Bilevel:
    """L_tr = a'C w + w'Q w / 2 + (a'a)(p'w)^2 / 2 and L_val = |w - t|^2 / 2 + a'D w: quadratic in w."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"C": (2, 3), "D": (2, 3), "Q": (3, 3), "p": (3,), "t": (3,), "w": (3,), "a": (2,)}
        draws = {name: torch.randn(*s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        self.C, self.D, self.p, self.t = (draws[name] for name in "CDpt")
        self.Q = draws["Q"] @ draws["Q"].T
        self.w, self.a = nn.Parameter(draws["w"]), nn.Parameter(draws["a"])

    def train_loss(self) -> torch.Tensor:
        a, w = self.a, self.w
        return a @ self.C @ w + 0.5 * w @ self.Q @ w + 0.5 * (a @ a) * (self.p @ w) ** 2

    def val_loss(self, w: torch.Tensor | None = None) -> torch.Tensor:
        w = self.w if w is None else w
        return 0.5 * (w - self.t).square().sum() + self.a @ self.D @ w

    def lower_step(self) -> None:
        (slope,) = torch.autograd.grad(self.train_loss(), self.w)
        with torch.no_grad():
            self.w.sub_(ETA * slope)


def test_the_hypergradient_is_the_derivative_through_the_step():
    problem = Bilevel()
    w, a = problem.w, problem.a
    start = w.detach().clone()
    # Exact: w' = w - eta dL_tr/dw as a function of a, by autograd through the gradient.
    (slope,) = torch.autograd.grad(problem.train_loss(), w, create_graph=True)
    (exact,) = torch.autograd.grad(problem.val_loss(w - ETA * slope), a)
    (result,) = hypergradient(
        problem.train_loss, problem.val_loss, [w], [a], lower_step=problem.lower_step, learning_rate=ETA
    )
    # dL_tr/da is quadratic in w, so its central difference is exact.
    torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)
    assert same_bits(w.detach(), start)
    (direct,) = torch.autograd.grad(problem.val_loss(), a)
    assert (result - direct).abs().max() > 1e-2  # not what leaving the step out would give


def test_both_ends_of_the_difference_see_the_same_dropout():
    w, a = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))

    def train_loss() -> torch.Tensor:
        return (nn.functional.dropout(w, 0.5) * a).sum()

    def lower_step() -> None:
        with torch.no_grad():
            w.sub_(ETA)

    (result,) = hypergradient(train_loss, lambda: w.sum(), [w], [a], lower_step=lower_step, learning_rate=ETA)
    # d2 L_tr / da dw is the mask: 0 or 2. With two masks it would be hundreds.
    assert set(result.mul(-1 / ETA).round(decimals=2).abs().tolist()) == {0.0, 2.0}


def test_no_slope_of_the_validation_loss_leaves_the_direct_term():
    w, a = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([3.0]))
    (result,) = hypergradient(
        lambda: (w * a).sum(), lambda: a.square().sum(), [w], [a], lower_step=lambda: None, learning_rate=ETA
    )
    assert result.tolist() == [6.0]


@pytest.mark.parametrize(
    ("a", "rank"),
    [
        ([1.0, 1.0, 1.0], 3),  # a tie at 1/k, as at the start
        ([1.0] * 7, 7),
        ([2.0, 0.0, 0.0, 0.0], 1),
        ([1.0, 1.0, 0.0, 0.0], 2),
        ([1.01, 1.0, 0.99], 1),  # softmax of the middle one is 0.333322
        ([-3.0, -1.0, -2.0], 1),  # raw a / sum(a) would be 0.5, 0.17, 0.33 and count the worst
        ([0.0, 0.1, 3.0], 1),
    ],
)
def test_a_rank_counts_if_its_weight_is_at_least_one_kth(a: list[float], rank: int):
    assert rank_of(torch.tensor(a)) == rank


def test_the_update_while_searching_by_slow_loops():
    B = nn.Parameter(torch.randn(3, 2))
    slot = WeighedB(B)
    assert slot.a.tolist() == [1, 1]
    with torch.no_grad():
        slot.a.copy_(torch.tensor([0.0, 1.0]))
    h = torch.randn(5, 2)
    weights = torch.exp(slot.a) / torch.exp(slot.a).sum()
    expected = torch.stack([weights[0] * row[0] * B[:, 0] + weights[1] * row[1] * B[:, 1] for row in h])
    torch.testing.assert_close(slot(h), expected)


class _Output(NamedTuple):
    loss: torch.Tensor


class Regression(nn.Module):
    """Two linears side by side; only the first one's input has anything to do with the target."""

    def __init__(self) -> None:
        super().__init__()
        self.useful, self.useless = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        for layer in (self.useful, self.useless):
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> Any:
        return _Output((self.useful(x)[:, 0] + self.useless(z)[:, 0] - y).square().mean())


@pytest.fixture
def set_rates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_them(**rates: float) -> None:
        for name, rate in rates.items():
            monkeypatch.setattr(f"pedyra.methods.autolora.{name.upper()}_RATE", rate)

    return set_them


def test_a_search_gives_weight_to_the_rank_that_explains_the_target(set_rates):
    set_rates(lower=0.05, upper=0.05)
    model: Any = get_peft_model(Regression(), LoraConfig(r=2, lora_alpha=4, target_modules=["useful", "useless"]))
    useful = model.base_model.model.useful
    with torch.no_grad():  # rank 0 reads the feature that matters, rank 1 reads noise
        useful.lora_A["default"].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(64, 4, generator=generator) for _ in range(2))
    parts = zip(x.split(16), z.split(16), (3 * x[:, 0]).split(16), strict=True)
    losses = [lambda model, x=x, z=z, y=y: model(x=x, z=z, y=y).loss for x, z, y in parts]
    train, validation = itertools.cycle(losses[:3]), itertools.cycle(losses[3:])
    result = search(linear_slots(model, "default"), model, train, validation, steps=40)
    a = useful.lora_B["default"].a
    assert a[0] > a[1] + 0.1 and result["useful"] == 1


def test_a_search_takes_adams_steps_on_a_and_b_and_no_others(make_net, net_batch, set_rates):
    """The steps that only serve the hypergradient are taken back, in values and in moments."""
    set_rates(lower=0.01, upper=1e-12)
    x, y = net_batch(1)
    model, reference = make_net(lora_alpha=8), make_net(lora_alpha=2)  # softmax(a) is 1/4 for rank 4
    losses = itertools.repeat(lambda model: (model(x) - y).square().mean())
    search(linear_slots(model, "default"), model, losses, losses, steps=3)
    optimizer = torch.optim.Adam([p for p in reference.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        (reference(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    result = {name: p for name, p in model.named_parameters() if name.endswith(("lora_A.default.weight", ".B"))}
    assert len(result) == len(expected) == 6
    for one, other in zip(result.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_search_takes_rows_of_training_only_and_each_once(prepare):
    run = prepare("lora")
    rows, size = run.trainer.train_dataset, 8
    seen: list[list[Any]] = []
    with patch("pedyra.trainer.upcoming._loss", lambda trainer, batch, model: seen[-1].append(batch["input_ids"])):
        for source, count in zip(upcoming(run.trainer).losses(1 / 3), (32, 16), strict=True):
            seen.append([])
            for loss in itertools.islice(source, count // size):
                loss(run.model)
    result = [row[row != 0].tolist() for batches in seen for batch in batches for row in batch]
    assert sorted(result) == sorted(list(row["input_ids"]) for row in rows)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "num_train_epochs": 2}, 12),
        ({"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 4}, 3),
    ],
)
def test_the_default_search_is_as_long_as_the_run(prepare, training: dict[str, Any], steps: int):
    assert total_steps(prepare("lora", training=training).trainer) == steps


@pytest.fixture
def fast_search(set_rates) -> None:
    """A search of three steps that does not find the same rank for all layers."""
    set_rates(upper=0.05)


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_a_run_is_plain_lora_from_scratch_at_the_ranks_of_the_search(prepare, make_base, kind: str, fast_search):
    run = prepare("autolora", kind, settings={"search_steps": 3})
    base, _, _ = make_base(run.recipe)
    fresh, _ = begin_method(run.recipe, base)
    weights = dict(fresh.named_parameters())
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "lora_A" in name:  # the first rows of what PEFT drew
            assert same_bits(parameter, weights[name][: len(parameter)])
        else:  # the base and the head are as they were before the search
            assert same_bits(parameter, weights[name])
    modules = [module for module in run.model.modules() if hasattr(module, "lora_A")]
    ranks = [module.r["default"] for module in modules]
    assert set(ranks) <= set(range(1, 9)) and len(set(ranks)) > 1  # eight are searched, of a budget of 4
    assert all(module.scaling["default"] == 32 / module.r["default"] for module in modules)


def test_two_searches_find_the_same_and_leave_the_training_its_random_numbers(prepare, fast_search):
    torch.manual_seed(1)
    expected = torch.rand(3)
    runs = []
    for _ in range(2):
        run = prepare("lora", lora={"r": 8})
        torch.manual_seed(1)
        adapt(run.trainer, AutoLora(search_steps=3))
        assert same_bits(torch.rand(3), expected)
        runs.append(run.model.peft_config["default"].rank_pattern)
    assert runs[0] == runs[1]

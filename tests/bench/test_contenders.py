"""Contenders by name, the patterns of fixed ranks, and one run of each in a loop without a Trainer."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn

from pedyra.bench.contenders import CONTENDERS, contender
from pedyra.bench.gora_look import by_importance
from pedyra.bench.looks import loss_shares, make_singular
from pedyra.bench.loop import make_student
from pedyra.bench.patterns import by_gain
from pedyra.bench.trial import run_trial
from pedyra.config import RankConfig
from pedyra.lora.attach import attach
from pedyra.methods.pedyra.settings import Settings

COSTS = {"0.q": 10, "0.up": 30, "1.q": 10, "1.up": 30}


class TwoLayers(nn.Module):
    """Width 32 with 40 hidden; `loss` is the distance to a fixed function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.q, self.up = nn.Linear(32, 40, bias=False), nn.Linear(40, 32, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.up(torch.tanh(self.q(x)))


def _draws(seed):
    """What draws the next batch's loss."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) / 6

    def draw():
        x = torch.randn(16, 32, generator=generator)
        return lambda model: (model(x) - x @ target).square().mean()

    return draw


def _run(name, *, rank=2, steps=40, lr=1e-2, **settings):
    return run_trial(
        TwoLayers(), ["q", "up"], contender(name, settings), _draws(1), rank=rank, lr=lr, steps=steps, seed=0
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_learns_within_the_budget(name):
    trial = _run(name, steps=60, lr=5e-2)
    assert not trial.diverged
    with torch.no_grad():
        loss = _draws(5)()
        assert loss(trial.model) < loss(TwoLayers())
    assert list(trial.ranks) == ["q", "up"]
    assert trial.parameters == sum(rank * 72 for rank in trial.ranks.values()) <= 2 * 2 * 72


def test_lora_here_is_peft_lora():
    layers = ["q", "up"]
    expected = make_student(TwoLayers(), dict.fromkeys(layers, 2), 1.0, 0)
    draw = _draws(1)
    optimizer = torch.optim.Adam([p for p in expected.parameters() if p.requires_grad])
    for step in range(10):
        draw()(expected).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 10)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(7, 32)
    torch.testing.assert_close(_run("lora", steps=10).model(x), expected(x))


def test_lora_plus_moves_b_faster_by_its_ratio():
    def first_step(name):
        model: Any = _run(name, steps=1).model.get_base_model()
        return model.q.lora_A["default"].A.detach(), model.q.lora_B["default"].weight.detach()

    (A, B), (A4, B4) = first_step("lora"), first_step("lora+4")
    torch.testing.assert_close(A4, A)
    torch.testing.assert_close(B4, 4 * B)


def _updates(model: Any):
    """scaling B A of both layers, as PEFT computes it."""
    base = model.get_base_model()
    return {name: base.get_submodule(name).get_delta_weight("default").detach() for name in ("q", "up")}


def test_para_keeps_the_largest_singular_triples_of_a_lora_of_four_times_the_rank():
    trial, wide = _run("para", rank=1, lr=5e-2), _updates(_run("lora", rank=4, lr=5e-2).model)
    parts = {name: torch.linalg.svd(update) for name, update in wide.items()}
    # A rank costs 72 parameters in both layers, so the budget of a uniform rank 1 keeps the two largest of all.
    least = torch.cat([S for _, S, _ in parts.values()]).sort(descending=True).values[1]
    found = _updates(trial.model)
    for name, (U, S, Vh) in parts.items():
        kept = S >= least
        assert trial.ranks[name] == int(kept.sum())
        rank = len(S)
        torch.testing.assert_close(found[name], U[:, :rank] @ torch.diag(S * kept) @ Vh[:rank], atol=1e-5, rtol=1e-4)


def test_sora_takes_its_threshold_off_every_gate_at_every_step_and_folds_what_is_left_into_a():
    model: Any = _run("sora", rank=3, steps=50, lr=0.0).model.get_base_model()
    torch.manual_seed(0)
    gates = [torch.randn(3) for _ in range(2)]  # the layers' order
    plain: Any = make_student(TwoLayers(), dict.fromkeys(["q", "up"], 3), 1.0, 0).get_base_model()
    for name, gate in zip(["q", "up"], gates, strict=True):
        left = gate.sign() * (gate.abs() - 50 * 3e-4).clamp(min=0)
        A = plain.get_submodule(name).lora_A["default"].weight
        torch.testing.assert_close(model.get_submodule(name).lora_A["default"].weight, left[:, None] * A)


def test_dylora_of_rank_1_has_nothing_to_draw_and_is_lora():
    assert _updates(_run("dylora", rank=1).model).keys() == {"q", "up"}
    for name, update in _updates(_run("dylora", rank=1).model).items():
        torch.testing.assert_close(update, _updates(_run("lora", rank=1).model)[name])
    differs = _updates(_run("dylora", rank=3).model)["q"] - _updates(_run("lora", rank=3).model)["q"]
    assert differs.abs().max() > 1e-3


def test_gora_starts_one_step_down_the_mean_gradient_within_the_rows_of_a():
    trial = _run("gora", steps=33, lr=0.0)
    base, draw = TwoLayers(), _draws(1)
    base.requires_grad_()
    for _ in range(32):
        draw()(base).backward()
    weights: Any = {name: base.get_submodule(name).weight for name in ("q", "up")}
    gradients = {name: weight.grad / 32 for name, weight in weights.items()}
    importance = {name: float((weights[name].detach() * G).abs().mean()) for name, G in gradients.items()}
    model: Any = trial.model.get_base_model()
    for name, update in _updates(trial.model).items():
        assert abs(trial.ranks[name] - 4 * importance[name] / sum(importance.values())) < 1
        A = model.get_submodule(name).lora_A["default"].A.detach()
        onto_rows = A.T @ torch.linalg.inv(A @ A.T) @ A
        step = 0.05 * (A.shape[1] / A.shape[0]) ** 0.5
        torch.testing.assert_close(update, -step * gradients[name] @ onto_rows, atol=1e-6, rtol=1e-3)
        assert model.get_submodule(name).scaling["default"] == pytest.approx(2 / trial.ranks[name] ** 0.5)


class Stretched(TwoLayers):
    """Inputs with one component of most variance, and a mean."""

    def forward(self, x):
        return super().forward(x * torch.tensor([2.0, *[0.5] * 31]) + 1)


def test_eva_takes_the_ranks_and_components_that_peft_takes():
    trial = run_trial(Stretched(), ["q", "up"], contender("eva"), _draws(1), rank=2, lr=0.0, steps=21, seed=0)
    config = LoraConfig(
        r=2, target_modules=["q", "up"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9999)
    )
    model: Any = get_peft_model(Stretched(), config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    initialize_lora_eva_weights(
        model,
        [torch.randn(16, 32, generator=generator) for _ in range(20)],  # type: ignore[arg-type]
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, mask, name: inputs[0],
        show_progress_bar=False,
    )
    found, expected = trial.model.get_base_model(), model.get_base_model()
    assert len(set(trial.ranks.values())) == 2 and sum(trial.ranks.values()) == 4
    for name, rank in trial.ranks.items():
        A: Any = found.get_submodule(name).lora_A["default"].A  # type: ignore[union-attr, index]
        theirs: Any = expected.get_submodule(name).lora_A["default"].weight  # type: ignore[union-attr, index]
        assert len(theirs) == rank
        # The same plane, nearly: PEFT goes through the batches one by one until the components hardly turn.
        assert torch.linalg.svdvals(A @ theirs.T).min() > 0.98


def test_autolora_searches_beside_the_run_and_spends_the_budget_on_the_ranks_of_most_weight(monkeypatch):
    draw = Mock(side_effect=_draws(1))
    trial = run_trial(TwoLayers(), ["q", "up"], contender("autolora"), draw, rank=2, lr=1e-2, steps=31, seed=0)
    assert draw.call_count == 31 + 2 * 6 and sum(trial.ranks.values()) == 4
    weights = {"q": [0.1, 0.5, 0.3, 0.1], "up": [0.26, 0.24, 0.25, 0.25]}
    search = Mock(return_value=Mock(weights=weights))
    monkeypatch.setattr("pedyra.bench.autolora_look.search", search)
    trial = _run("autolora", steps=1)
    assert trial.ranks == {"q": 2, "up": 2}  # 0.5, 0.3, 0.26 and 0.25
    weights["up"] = [0.26, 0.1, 0.4, 0.24]
    trial = _run("autolora", steps=1)
    assert trial.ranks == {"q": 2, "up": 2}  # 0.5, 0.4, 0.3, 0.26
    weights["q"] = [0.7, 0.1, 0.1, 0.1]
    trial = run_trial(
        TwoLayers(), ["q", "up"], contender("autolora"), _draws(1), rank=2, lr=0.0, steps=1, seed=0, scaling=5.0
    )
    assert trial.ranks == {"q": 1, "up": 3}
    model: Any = trial.model.get_base_model()  # alpha is 10
    assert model.q.scaling["default"] == 10 and model.up.scaling["default"] == pytest.approx(10 / 3)
    weights["q"] = [float("nan")] * 4
    assert _run("autolora", steps=1).ranks == {"q": 2, "up": 2}  # it diverged


def test_gora_spends_the_budget_of_a_uniform_rank_between_half_and_four_times_of_it():
    shares = {"0.q": [1.0], "0.up": [1.0], "1.q": [1e-9], "1.up": [98.0]}
    # 160 parameters: 1.up is due 5.2 ranks of 30 and gets 5; the others at least 1 (50 parameters) make it 4 at most,
    # so 110 are left for it: 3, and 20 for the two of 10 that miss most.
    assert by_importance(COSTS, 2, shares) == {"0.q": 2, "0.up": 1, "1.q": 2, "1.up": 3}
    even = by_importance(COSTS, 2, dict.fromkeys(COSTS, [1.0]))  # 40 parameters each: 4 of 10, and 1 of 30 with 20 left
    assert even == {"0.q": 5, "0.up": 1, "1.q": 5, "1.up": 1}
    one = {**dict.fromkeys("abc", [1.0]), "d": [97.0]}
    assert by_importance(dict.fromkeys("abcd", 10), 10, one) == {"a": 5, "b": 5, "c": 5, "d": 25}
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 2, 5):
        drawn = {name: [float(torch.rand((), generator=generator) ** 4)] for name in COSTS}
        ranks = by_importance(COSTS, rank, drawn)
        assert 80 * rank - 10 < sum(COSTS[name] * ranks[name] for name in COSTS) <= 80 * rank
        assert all(max(1, rank // 2) <= found <= 4 * rank for found in ranks.values())


@pytest.mark.parametrize("name", ["probe-ranks", "shares-ranks", "gradient-ranks"])
def test_a_look_takes_its_steps_from_the_run(name):
    for steps in (30, 60):
        draw = Mock(side_effect=_draws(1))
        run_trial(TwoLayers(), ["q", "up"], contender(name), draw, rank=2, lr=1e-2, steps=steps, seed=0)
        assert draw.call_count == steps


def test_a_run_that_a_look_would_use_up_is_refused():
    with pytest.raises(ValueError, match="looks at 32 batches .* a run of 32 steps leaves none"):
        _run("gora", steps=32)


def test_a_short_wide_run_is_no_wider_than_a_layer():
    assert sum(_run("probe-ranks", rank=9).ranks.values()) <= 2 * 9  # 4 x 9 is above the width of 32


@pytest.mark.parametrize("name", ["lora", "para", "sora", "dylora", "gora", "autolora"])
def test_a_run_that_diverges_ends_at_the_budget_too(name):
    assert sum(_run(name, lr=1e30).ranks.values()) <= 4


def test_a_start_along_the_gradient_is_its_top_right_singular_vectors():
    model: Any = _run("gradient-start", steps=21, lr=0.0).model.get_base_model()
    base, draw = TwoLayers(), _draws(1)
    base.q.weight.requires_grad_()
    for _ in range(20):
        draw()(base).backward()
    assert base.q.weight.grad is not None
    right = torch.linalg.svd(base.q.weight.grad).Vh[:2]
    A = model.q.lora_A["default"].A.detach()
    cosines = (A @ right.T).abs() / A.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines, torch.eye(2), atol=1e-4, rtol=0)


def test_singular_triples_are_the_same_function_and_their_shares_add_up_to_what_was_saved():
    trial = _run("lora", rank=3, steps=60, lr=5e-2)
    adapted, x = attach(trial.model), torch.randn(9, 32)
    before = trial.model(x)
    make_singular(adapted)
    torch.testing.assert_close(trial.model(x), before, atol=1e-5, rtol=1e-4)
    for layer in adapted:
        torch.testing.assert_close(layer.a.A @ layer.a.A.T, torch.eye(3))
        assert layer.b.weight.norm(dim=0).diff().max() <= 0  # highest first

    loss = _draws(1)()
    # The same batch every time, so that the shares have no noise.
    shares = loss_shares(trial.model, adapted, lambda: loss, 200)
    with torch.no_grad():
        saved = loss(TwoLayers()) - loss(trial.model)
    assert float(sum(share.sum() for share in shares)) == pytest.approx(float(saved), rel=1e-3)
    torch.testing.assert_close(trial.model(x), before, atol=1e-5, rtol=1e-4)


def test_patterns_by_type_by_name_and_by_gain():
    def ranks(name):
        pattern = contender(name).pattern
        assert pattern is not None
        return pattern(COSTS, 2, {})

    assert ranks("static:q=1,1.q=5") == {"0.q": 1, "0.up": 2, "1.q": 5, "1.up": 2}
    # 160 parameters: 16 ranks of 10, or five of 30 with 10 left over.
    assert ranks("only:q") == {"0.q": 8, "0.up": 0, "1.q": 8, "1.up": 0}
    assert ranks("only:up") == {"0.q": 0, "0.up": 3, "1.q": 0, "1.up": 2}
    gains = {"0.q": [1.0, 0.5], "0.up": [9.0, 2.9], "1.q": [0.99, 0.98, 0.97], "1.up": [9.0, 8.0]}
    # Per parameter: 0.3 0.3 0.267 (3 x 30), 0.1 0.099 0.098 0.097 (4 x 10), 0.0967 (30) are 160; 0.05 is left out.
    assert by_gain(COSTS, 2, gains) == {"0.q": 1, "0.up": 2, "1.q": 3, "1.up": 2}


def test_settings_by_name_and_by_option():
    assert contender("pedyra:moves=4,orth_weight=1e-1", {"min_rank": 0}).config == RankConfig(
        moves=4, orth_weight=0.1, min_rank=0
    )
    assert contender("random", {"min_rank": 0}) is CONTENDERS["random"]  # the option is for pedyra
    config = contender("random:max_rank=null,min_rank=0").config
    assert config is not None and config.min_rank == 0


def test_what_benches_vary_of_pedyra_is_beside_its_config():
    found = contender("pedyra:reassignment=0,moves=3")
    assert found.config == RankConfig(moves=3) and found.settings == Settings(reassignment=0)
    assert found.config_digest != contender("pedyra:moves=3").config_digest


def test_elalora_moves_as_many_as_it_is_told():
    for name, moves in {"elalora": 4, "elalora:moves=7": 7}.items():
        found = contender(name)
        assert found.config is not None
        rule: Any = found.rule(found.config, 2)
        assert rule.policy.moves == moves


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lorra", "'lorra' is unknown; choose from lora"),
        ("lora:moves=3", "lora moves no ranks"),
        ("pedyra:move=3", "did you mean 'moves'"),
        ("l1ra:start=svd", "l1ra has no use for start, or is defined by it; it takes interval, .*, max_rank$"),
        ("adalora:moves=3", "adalora has no use for moves"),
        ("prune:expand=gradient", "rank.expand was removed"),
        ("pedyra:moves", "not of the form name=value"),
        ("static:q=-1", "must be an integer of at least 0"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        contender(name)


@pytest.mark.parametrize("name", ["static:v=1", "only:v", "static:q=0,up=0"])
def test_a_pattern_that_fits_no_layer_is_refused(name):
    with pytest.raises(ValueError, match="the layers are q, up|every layer has rank 0"):
        _run(name)

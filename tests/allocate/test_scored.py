"""A method of scores and a plan: both may be one's own, how many triples move at most, and what averages forget."""

from __future__ import annotations

import math

import pytest
import torch
from windows import SCHEDULE, STEPS, Forced, allocate, forced

from pedyra.allocate.allocation import make_plan
from pedyra.allocate.scored import ema_window, most_moves
from pedyra.allocate.scores import ScoreState
from pedyra.pe_dyra.method import PeDyra


class FirstLayerLoses(Forced):
    """It prunes the first layer's first triple, down to rank 1."""

    def plan(self, scores, now):
        name = next(iter(scores))
        return make_plan(scores, {name: (0,)} if now.ranks[name] > 1 else {}, {}, dict.fromkeys(scores, 0.0))


def test_a_plan_of_ones_own_decides(make_net, train_net):
    model = make_net()
    allocator = allocate(model, forced(FirstLayerLoses, **SCHEDULE))
    train_net(model, allocator.optimizer, allocator, STEPS)
    assert allocator.ranks == {"layers.0": 1, "layers.1": 4, "layers.2": 4}


class Ascending(ScoreState):
    """Scores that nothing else would give: 10 for the first layer's triples, 11 for the next, and so on."""

    def layer_scores(self):
        return torch.arange(10.0, 10 + len(self.layers))


class ByAscending(PeDyra):
    scores = Ascending


def test_a_methods_own_scores_have_the_word_whatever_the_settings_say(make_net, train_net):
    model = make_net()
    allocator = allocate(model, forced(ByAscending, **SCHEDULE, budget="ranks"))
    (first, *_) = train_net(model, allocator.optimizer, allocator, STEPS)
    assert first["scores"] == {f"layers.{i}": [10.0 + i] * 4 for i in range(3)}
    assert {name for name, *_ in first["pruned"]} == {"layers.0"}


@pytest.mark.parametrize(
    ("moves", "total_rank", "most"),
    [(None, 576, 12), (None, 12, 1), (7, 576, 7), (0, 576, 0)],  # 12 of 576: Table 14
)
def test_the_default_number_of_moves_is_the_papers(moves: int | None, total_rank: int, most: int):
    assert most_moves(PeDyra(moves=moves), total_rank) == most


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.85, 0.95])
def test_an_ema_has_forgotten_what_came_before_its_window(beta):
    # Two histories that differ wildly, then W equal steps: Eq. (3)'s averages agree to 1e-6 of the difference.
    window = ema_window(beta)
    old, fresh = [1.0, 1.0], [0.0, 0.0]
    for step in range(window):
        product = 0.3 + 0.2 * math.sin(step)
        for state in (old, fresh):
            state[0] = beta * state[0] + (1 - beta) * product
            state[1] = beta * state[1] + (1 - beta) * abs(product - state[0])
    assert abs(old[0] - fresh[0]) <= 1e-6
    assert abs(old[1] - fresh[1]) <= 1.01e-6


def test_the_window_is_not_longer_than_it_must_be():
    assert ema_window(0.85) == 103
    forgotten = lambda window: (1 + 0.15 * window) * 0.85**window  # noqa: E731
    assert forgotten(103) <= 1e-6 < forgotten(102)

"""What plans ranks, over drawn situations: against loops that do one thing at a time, and what holds for any plan."""

from __future__ import annotations

from collections import deque
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pedyra.allocate.allocation import RankPlan, layer_means, lowest, prunable, round_robin
from pedyra.pe_dyra.equations import plan_adjustment

Triples = dict[str, list[float]]

TIED = st.sampled_from([0.0, 0.5, 1.0])
ANY = st.floats(0, 1e6, width=32)
NAMES = st.lists(st.sampled_from("qkvogud"), min_size=1, max_size=7, unique=True)
MIN_RANKS = st.integers(0, 3)
MOVES = st.integers(0, 30)


@st.composite
def drawn_scores(draw: st.DrawFn, least: int = 0) -> Triples:
    score = draw(st.sampled_from([TIED, ANY]))
    return {name: draw(st.lists(score, min_size=least, max_size=7)) for name in draw(NAMES)}


@st.composite
def drawn_caps(draw: st.DrawFn, scores: Triples) -> dict[str, int]:
    return {name: len(values) + draw(st.integers(0, 3)) for name, values in scores.items()}


def one_by_one(scores: Triples, moves: int, min_rank: int) -> Triples:
    """Layer -> the indices that go, when the lowest triple of a layer with more than `min_rank` goes, `moves` times."""
    left = {name: dict(enumerate(values)) for name, values in scores.items()}
    gone: dict[str, list] = {}
    for _ in range(moves):
        least: tuple[float, str, int] | None = None
        for name, triples in left.items():
            for index, score in triples.items():
                if len(triples) > min_rank and (least is None or score < least[0]):
                    least = score, name, index
        if least is None:
            break
        _, name, index = least
        del left[name][index]
        gone.setdefault(name, []).append(index)
    return {name: sorted(indices) for name, indices in gone.items()}


def dealt(ranking, ranks, caps, sizes, available: int) -> dict[str, int]:
    """A queue: who can take one goes to its end, who cannot leaves it, for there is never more to take."""
    queue, taken = deque(ranking), dict.fromkeys(ranking, 0)
    while queue:
        name = queue.popleft()
        if sizes[name] <= available and ranks[name] + taken[name] < caps[name]:
            taken[name] += 1
            available -= sizes[name]
            queue.append(name)
    return {name: count for name, count in taken.items() if count}


def check_consistent(plan: RankPlan, scores: Triples, min_rank: int, caps: dict[str, int]) -> None:
    assert list(plan.ranks) == list(scores)
    for name, values in scores.items():
        gone = plan.pruned.get(name, ())
        assert list(gone) == sorted(set(gone)) and all(0 <= index < len(values) for index in gone)
        assert plan.ranks[name] == len(values) - len(gone) + plan.added.get(name, 0) <= caps[name]
        best = sorted(range(len(values)), key=lambda i: (values[i], i))[max(0, len(values) - min_rank) :]
        assert not {*best} & {*gone}  # what a layer keeps at least are its best
    assert all(plan.pruned.values()) and all(plan.added.values())


@given(drawn_scores(), MOVES, MIN_RANKS)
def test_the_lowest_go_one_by_one_and_never_a_layers_best(scores, moves, min_rank):
    pruned = lowest(prunable(scores, min_rank), moves)
    assert {name: list(indices) for name, indices in pruned.items()} == one_by_one(scores, moves, min_rank)


@given(drawn_scores())
def test_eq7_is_the_exact_mean(scores):
    for name, mean in layer_means(scores).items():
        values = [Fraction(value) for value in scores[name]]
        assert mean == pytest.approx(float(sum(values) / len(values)) if values else 0.0, rel=1e-12)


@given(st.data(), NAMES, st.integers(0, 60))
def test_triples_are_dealt_in_turn_while_one_is_affordable(data, names, available):
    sizes = {name: data.draw(st.integers(1, 20)) for name in names}
    ranks = {name: data.draw(st.integers(0, 6)) for name in names}
    caps = {name: data.draw(st.integers(0, 12)) for name in names}
    added = round_robin(names, ranks, caps, sizes, available)
    assert added == dealt(names, ranks, caps, sizes, available)
    rest = available - sum(sizes[name] * count for name, count in added.items())
    assert rest >= 0
    assert all(sizes[n] > rest or ranks[n] + added.get(n, 0) >= caps[n] for n in names)  # nothing more would fit


@given(st.data(), drawn_scores(least=1))
def test_algorithm_2_prunes_the_lowest_and_gives_one_to_each_best_layer(data, scores):
    spare = sum(len(values) - 1 for values in scores.values())
    k = data.draw(st.integers(0, min(len(scores), spare)))
    plan = plan_adjustment(scores, moves=k, min_rank=1, max_ranks=dict.fromkeys(scores, 10**6))
    assert {name: list(indices) for name, indices in plan.pruned.items()} == one_by_one(scores, k, 1)
    assert plan.added == dict.fromkeys(sorted(scores, key=lambda name: -plan.layer_scores[name])[:k], 1)


@given(st.data(), drawn_scores(), MOVES, MIN_RANKS)
def test_the_sum_of_ranks_is_conserved(data, scores, moves, min_rank):
    caps = data.draw(drawn_caps(scores))
    plan = plan_adjustment(scores, moves=moves, min_rank=min_rank, max_ranks=caps)
    check_consistent(plan, scores, min_rank, caps)
    assert sum(plan.ranks.values()) == sum(map(len, scores.values()))
    assert sum(plan.added.values()) == sum(map(len, plan.pruned.values())) <= moves


@given(st.data(), drawn_scores(), MIN_RANKS)
def test_parameters_never_exceed_the_budget_over_a_chain_of_adjustments(data, scores, min_rank):
    sizes = {name: data.draw(st.sampled_from([3, 7, 20, 51])) for name in scores}
    caps = data.draw(drawn_caps(scores))
    budget = sum(len(values) * sizes[name] for name, values in scores.items())
    for _ in range(4):
        moves, used = data.draw(st.integers(0, 8)), sum(len(values) * sizes[name] for name, values in scores.items())
        plan = plan_adjustment(
            scores, moves=moves, min_rank=min_rank, max_ranks=caps, parameters=sizes, spare=budget - used
        )
        check_consistent(plan, scores, min_rank, caps)
        assert sum(map(len, plan.pruned.values())) <= moves
        assert sum(rank * sizes[name] for name, rank in plan.ranks.items()) <= budget
        if not moves:
            assert not plan.pruned and not plan.added
        scores = {name: data.draw(st.lists(ANY, min_size=rank, max_size=rank)) for name, rank in plan.ranks.items()}

"""Triples on trial: what is measured is their worth, a swap is exact on a resume, and a settled run is a plain LoRA."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from typing import Any

import pytest
import torch
from windows import inside, pedyra

from pedyra.allocate.checkpoint import RECORD
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.schedule import margin_at, moves_at
from pedyra.config import RankConfig
from pedyra.lora.attach import attach
from pedyra.lora.layer import adapted_layers
from pedyra.methods.pedyra.noise import chance
from pedyra.methods.pedyra.swaps import Gain
from pedyra.methods.pedyra.trials import known_lengths, predicted_losses

EAGER: dict[str, Any] = dict(
    interval=6, initial_warmup=0, final_warmup=3, moves=4, certainty=0.0, margin=1e-3, reassignment=0
)
"""Two adjustments of 18 steps. The first only looks; at the second whatever gains anything replaces what is on trial,
in steps 11 and 12."""


def allocate(model: Any, config: RankConfig | dict[str, Any], steps: int) -> RankAllocator:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given: dict[str, Any] = config if isinstance(config, dict) else {"config": config}
    return RankAllocator(model, optimizer, total_steps=steps, **given)


def test_without_moves_training_is_pefts_lora_to_the_last_bit(make_net, train_net, net_batch):
    ours, theirs = make_net(), make_net()
    allocator = allocate(ours, RankConfig(moves=0), 20)
    assert allocator.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    train_net(ours, allocator.optimizer, allocator, 20)
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 21):
        x, y = net_batch(step)
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, _ = net_batch(0)
    assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(layer.a.E, torch.ones(layer.rank)) for layer in allocator.layers)


def test_what_is_on_trial_is_off_in_the_third_part_and_on_again_after_it(make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "margin": 1e9}), 18)
    for step in range(1, 12):
        train_net(model, allocator.optimizer, allocator, 1, first=step)
        projections = [layer.a.kept_directions for layer in allocator.layers]
        off = sum(len(kept) - kept.trace() for kept in projections if kept is not None)
        # From the end of step 10: two by their scores, and the scout of a layer, are on trial in 11 and 12.
        assert float(off) == pytest.approx(3 if step >= 10 else 0, abs=1e-4)
    before = {layer.name: (layer.a.A, layer.b.weight) for layer in allocator.layers}
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=12)
    assert len(record["trials"]) == 3 and not record["pruned"] and not record["added"]
    for layer in allocator.layers:
        assert layer.a.kept_directions is None and layer.a.probe is None
        assert (layer.a.A, layer.b.weight) == before[layer.name]  # the very Parameters


def test_nothing_is_tried_that_no_direction_of_the_last_look_could_replace(make_net, train_net):
    for sure, tried in ((0, False), (1, True)):
        model = make_net(trained=True)
        allocator = allocate(model, pedyra(**EAGER), 18)
        train_net(model, allocator.optimizer, allocator, 9)
        (record,) = allocator.history
        assert record["sure"] > 1  # beyond no error, with `certainty` 0
        inside(allocator).last.sure = sure
        train_net(model, allocator.optimizer, allocator, 1, first=10)
        assert any(layer.a.kept_directions is not None for layer in allocator.layers) == tried


@pytest.mark.parametrize("explained", [False, True])
def test_nothing_moves_for_what_chance_explains_though_triples_are_on_trial(explained, make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 11)
    sketch = inside(allocator).sketching.current
    assert sketch is not None
    sketch.chance = lambda certainty: 1e9 if explained else certainty
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=12)
    assert record["trials"] and bool(record["added"]) == (not explained)


@pytest.mark.parametrize("tried", [True, False])
def test_nothing_moves_for_a_gain_too_small_to_matter(tried, make_net, train_net, monkeypatch):
    monkeypatch.setattr("pedyra.methods.pedyra.swaps.WORTH_MOVING", 1e9)
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    if not tried:  # what is spare could pay
        allocator.initial_parameters += 1000
        monkeypatch.setattr("pedyra.methods.pedyra.run.choose", lambda *_, **__: ({}, {}))
    train_net(model, allocator.optimizer, allocator, 11)
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=12)
    assert bool(record["trials"]) == tried and not record["added"]
    losses = predicted_losses(known_lengths(allocator.layers), inside(allocator).curvature())
    assert record["least_gain"] == pytest.approx(1e9 * sum(map(sum, losses.values())) / allocator.parameters)


def test_a_new_triple_begins_along_the_direction_that_a_plan_takes(make_net, monkeypatch):
    """10 is 2.2 errors, surer by what it saves, and 6 is 4: it alone is beyond a chance of 3."""
    allocator = allocate(make_net(), pedyra(**{**EAGER, "certainty": 1.0, "sketch_size": 2}), 18)
    sketch, layer = inside(allocator).sketching.current, allocator.layers[0]
    assert sketch is not None
    monkeypatch.setattr(sketch, "_measured", lambda: [[Gain(10.0, 4.5), Gain(6.0, 1.5)] for _ in allocator.layers])
    monkeypatch.setattr(sketch, "chance", lambda certainty: 3.0)
    sketch.left = [torch.eye(layer.b.out_features)[:, :2] for layer in allocator.layers]
    sketch.right = [torch.eye(layer.a.in_features)[:2] for layer in allocator.layers]
    candidates, directions = inside(allocator).sketching.candidates(), inside(allocator).sketching.directions(layer)
    assert candidates[layer.name][0].mean == 6.0
    assert int(directions[1][0].argmax()) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_on_trial_is_there_while_evaluating(fused, make_net, train_net, net_batch):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER, fused=fused), 18)
    train_net(model, allocator.optimizer, allocator, 10)
    x, _ = net_batch(0)
    training = model(x).detach()
    with torch.no_grad():
        judged = model.eval()(x)
        for layer in allocator.layers:
            layer.a.kept_directions = None
        whole = model(x)
    assert torch.equal(judged, whole)
    assert not torch.allclose(training, whole), "nothing is on trial: the test would prove nothing"


def test_where_e_was_trained_before_nothing_is_turned(make_net, train_net):
    model = make_net(trained=True)
    for layer in attach(model):
        layer.a.E.data.uniform_(0.5, 2.0)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 9)
    allocator.optimizer.param_groups[0]["lr"] = 0.0
    before = [layer.b.weight @ layer.a.weight for layer in allocator.layers]
    train_net(model, allocator.optimizer, allocator, 1, first=10)
    assert any(layer.a.kept_directions is not None for layer in allocator.layers)
    assert all(torch.equal(b.b.weight @ b.a.weight, old) for b, old in zip(allocator.layers, before, strict=True))


def test_a_run_whose_weights_became_nan_goes_on_to_its_end(make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 8)
    with torch.no_grad():
        allocator.layers[1].b.weight[0, 0] = torch.nan
    train_net(model, allocator.optimizer, allocator, 10, first=9)
    assert allocator.step == 18


def test_state_that_cannot_turn_is_refused_after_the_first_step(make_net, train_net):
    for start in ("lora", "svd"):  # where E is trained, nothing is turned
        model = make_net()
        optimizer = torch.optim.Adadelta([p for p in model.parameters() if p.requires_grad])
        allocator = RankAllocator(model, optimizer, total_steps=18, **pedyra(**EAGER, start=start))
        if start == "lora":
            with pytest.raises(ValueError, match=r"Adadelta keeps 'acc_delta'.*use adamw_torch"):
                train_net(model, optimizer, allocator, 1)
        else:
            train_net(model, optimizer, allocator, 18)


def test_a_run_that_only_observes_does_so_to_its_end(make_net, train_net):
    model = make_net()
    allocator = allocate(model, pedyra(interval=2, final_warmup=1, moves=0, patience=2), 12)
    train_net(model, allocator.optimizer, allocator, 12)
    assert [record["step"] for record in allocator.history] == [2, 4, 6, 8, 10] and not allocator.settled


def test_where_no_gain_is_sure_nothing_is_ever_tried_and_the_run_is_a_lora(make_net, train_net, net_batch):
    ours, theirs = make_net(), make_net()
    allocator = allocate(ours, pedyra(**{**EAGER, "certainty": 1e9}), 18)
    for step in range(1, 19):
        train_net(ours, allocator.optimizer, allocator, 1, first=step)
        assert all(layer.a.kept_directions is None for layer in allocator.layers)
    assert [record["trials"] for record in allocator.history] == [[], []]
    plain = allocate(theirs, RankConfig(moves=0), 18)
    train_net(theirs, plain.optimizer, plain, 18)
    x, _ = net_batch(0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)  # probes change the order of sums at most


def test_shared_work_is_tried_as_a_direction_that_is_worth_nothing(make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "moves": 1, "margin": 1e9}), 18)
    layer = allocator.layers[1]
    train_net(model, allocator.optimizer, allocator, 9)
    with torch.no_grad():
        layer.b.weight[:, 3] = layer.b.weight[:, 0]  # of rank 3, and each triple does as much as any other
    A, B = layer.a.A.detach().clone(), layer.b.weight.detach().clone()
    allocator.optimizer.param_groups[0]["lr"] = 0.0
    train_net(model, allocator.optimizer, allocator, 1, first=10)
    assert layer.a.kept_directions is not None
    assert float(torch.linalg.matrix_rank(layer.a.kept_directions, atol=1e-4)) == 3  # of 4: one direction is off
    torch.testing.assert_close(B @ layer.a.kept_directions @ A, B @ A, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.a.A, A) and torch.equal(layer.b.weight, B)


def test_a_trial_that_moves_nothing_leaves_the_basis_in_which_adam_learns(make_net, train_net):
    """What was turned for a trial is not turned for good: Adam's steps depend on the basis."""
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "margin": 1e9}), 18)
    train_net(model, allocator.optimizer, allocator, 10)
    allocator.optimizer.param_groups[0]["lr"] = 0.0
    factors = [p.detach().clone() for layer in allocator.layers for p in (layer.a.A, layer.b.weight)]
    assert any(not torch.equal(W, torch.eye(len(W))) for W in inside(allocator).sketching.turns().values())
    train_net(model, allocator.optimizer, allocator, 2, first=11)
    assert allocator.history[-1]["trials"] and not allocator.history[-1]["pruned"]
    after = [p for layer in allocator.layers for p in (layer.a.A, layer.b.weight)]
    assert all(torch.equal(one, two) for one, two in zip(factors, after, strict=True))


def test_a_direction_that_goes_takes_with_it_what_was_off(make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 11)
    allocator.optimizer.param_groups[0]["lr"] = 0.0
    off, tried = {}, {}
    for layer in allocator.layers:
        assert layer.a.kept_directions is not None
        off[layer.name] = (layer.b.weight @ layer.a.kept_directions @ layer.a.A).detach()
        tried[layer.name] = layer.rank - round(float(layer.a.kept_directions.trace()))
    (record,) = train_net(model, allocator.optimizer, allocator, 1, first=12)
    gone = {name: sum(pruned[0] == name for pruned in record["pruned"]) for name in off}
    whole = [layer for layer in allocator.layers if gone[layer.name] and gone[layer.name] == tried[layer.name]]
    assert whole, "no layer lost all that it had on trial: the test would prove nothing"
    for layer in whole:  # new triples add nothing yet
        torch.testing.assert_close(layer.b.weight @ layer.a.A, off[layer.name], rtol=1e-4, atol=1e-5)


def test_a_run_that_moved_nothing_settles_and_is_left_alone(make_net, train_net):
    model = make_net()
    settings: dict[str, Any] = dict(interval=4, final_warmup=1, patience=2, certainty=1e9, reassignment=0)
    allocator = allocate(model, pedyra(**settings), 24)
    assert allocator.schedule.adjustments == (4, 8, 12, 16, 20)
    train_net(model, allocator.optimizer, allocator, 24)
    assert [record["step"] for record in allocator.history] == [4, 8]
    assert allocator.settled and not any(allocator.tracks(step) for step in range(9, 25))
    restless = allocate(make_net(), pedyra(**{**settings, "patience": 0}), 24)
    train_net(restless.model, restless.optimizer, restless, 24)
    assert len(restless.history) == 5 and not restless.settled


@pytest.mark.parametrize("resume_at", [4, 6, 10, 11, 12, 13])
def test_resuming_before_in_and_after_a_trial_equals_the_unbroken_run(
    resume_at, make_trainer, tmp_path, run_state, assert_equal
):
    config = pedyra(**EAGER)
    whole, callback = make_trainer(tmp_path / "whole", config, save_strategy="steps", save_steps=1, max_steps=18)
    whole.train()
    unbroken = run_state(whole, callback)
    assert unbroken["history"][1]["added"], "nothing moved: the test would prove nothing"
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{resume_at}", again / f"checkpoint-{resume_at}")
    resumed, callback = make_trainer(again, config, save_strategy="no", max_steps=18)
    resumed.train(resume_from_checkpoint=str(again / f"checkpoint-{resume_at}"))
    assert_equal(run_state(resumed, callback), unbroken)


@pytest.mark.parametrize(("resume_at", "adjusted"), [(4, [12]), (7, [12]), (8, [12]), (10, []), (13, [])])
def test_without_its_side_file_a_run_goes_on_and_moves_only_by_a_whole_sketch(
    resume_at, adjusted, make_trainer, tmp_path
):
    config = pedyra(**EAGER)
    first, _ = make_trainer(tmp_path, config, save_strategy="steps", save_steps=1, max_steps=18)
    first.train()
    folder = tmp_path / f"checkpoint-{resume_at}"
    (folder / RECORD).unlink()
    resumed, callback = make_trainer(tmp_path, config, save_strategy="no", max_steps=18)
    with pytest.warns(UserWarning, match="training goes on, not as an exact resume"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert [record["step"] for record in callback.allocator.history] == adjusted  # a sketch takes four steps


def test_the_record_has_lengths_of_what_was_tried_and_scores_of_what_goes(make_net, train_net):
    """Both are of the directions into which layers are turned, not of the rows as they are."""
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 10)
    allocator.optimizer.param_groups[0]["lr"] = 0.0  # what is on trial from here on are singular directions to the end
    singular = {
        layer.name: layer.scaling * torch.linalg.svdvals((layer.b.weight @ layer.a.A).detach())[: layer.rank]
        for layer in allocator.layers
    }
    known = inside(allocator).curvature()
    (record,) = train_net(model, allocator.optimizer, allocator, 2, first=11)
    born = allocator.history[0]["added"]
    tried = [(name, triple, length) for name, triple, *_, length in record["trials"] if name not in born]
    assert tried
    for name, triple, length in tried:
        assert length == pytest.approx(float(singular[name][triple]), rel=1e-4)
    lost = [(name, triple, score) for name, triple, score in record["pruned"] if name not in born]
    assert lost
    for name, triple, score in lost:
        assert score == pytest.approx(known[name].losses([float(singular[name][triple])])[0], rel=1e-3)


def test_at_a_budget_of_ranks_every_triple_costs_one(make_net, train_net):
    tried = {}
    for budget in ("ranks", "parameters"):
        model = make_net(trained=True)
        allocator = allocate(model, pedyra(**{**EAGER, "budget": budget, "moves": 4, "margin": 1e9}), 18)
        train_net(model, allocator.optimizer, allocator, 9)
        inside(allocator).last.promising = []  # no layer is tried for its curvature alone
        train_net(model, allocator.optimizer, allocator, 1, first=10)
        assert inside(allocator).sketching.current is not None
        tried[budget] = sum(map(len, inside(allocator).sketching.current.on_trial))
    # The lowest is one of the cheapest layer, and two of those must pay for one of the dearest.
    assert tried == {"ranks": moves_at(allocator.moves, inside(allocator).last.moved), "parameters": 2}


def test_by_default_no_step_is_observed_and_scores_are_read_off_the_triples(make_net, train_net):
    model = make_net()
    allocator = allocate(model, RankConfig(interval=4, initial_warmup=0, final_warmup=1), 12)
    assert allocator.snapshot()["layer_scores"] is None  # of the start they say nothing
    train_net(model, allocator.optimizer, allocator, 3)
    assert not any(allocator.tracks(step) for step in range(1, 13))
    layer = allocator.layers[0]
    pairs = zip(layer.a.A.detach(), layer.b.weight.detach().T, strict=True)
    by_hand = [float((layer.scaling * torch.outer(b, a)).norm() ** 2 / 2) for a, b in pairs]  # all curve by 1 as yet
    snapshot = allocator.snapshot()
    assert snapshot["layer_scores"][layer.name] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert snapshot["grad_norms"] is None


def test_short_intervals_are_refused_as_steps_and_widened_as_fractions(make_net):
    with pytest.raises(ValueError, match="rank.interval is 3, but .* takes 4 or more; raise it"):
        allocate(make_net(), RankConfig(interval=3), 40)
    unsketched = RankConfig.scored(initial_warmup=0.05)
    for total, config, interval in (
        (300, RankConfig(), 27),  # 15 steps are 5 %, of which five would judge
        (1000, RankConfig(), 50),
        (40, RankConfig(), 7),  # a quarter of what the last phase leaves
        (40, unsketched, 2),
    ):
        assert allocate(make_net(), config, total).schedule.interval == interval


@pytest.mark.parametrize(("certainty", "tried"), [(1.2, False), (0.2, True)])
def test_nothing_is_tried_for_gains_that_chance_explains(certainty, tried, make_net, train_net):
    """A third part of two steps has four patterns of signs: the largest of them is within chance at 1.2 errors.

    At 0.2 errors the bound is the smallest of the four, and not the pattern seen, which roundings alone would decide.
    """
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "certainty": certainty}), 18)
    (look,) = train_net(model, allocator.optimizer, allocator, 6)
    most = max(mean / error for mean, error, _ in look["gains"].values())
    chance = math.inf if look["chance"] is None else look["chance"]
    assert certainty < most and (most > chance) == tried, "the test would prove nothing"
    assert not math.isclose(most, chance, rel_tol=0.01), "roundings decide: the test would prove nothing"
    (second,) = train_net(model, allocator.optimizer, allocator, 6, first=7)
    assert bool(second["trials"]) == tried


def test_chance_is_asked_of_candidates_only_not_of_triples_on_trial(make_net, train_net):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "margin": 1e9}), 18)
    train_net(model, allocator.optimizer, allocator, 11)
    sketch = inside(allocator).sketching.current
    assert sketch is not None and any(len(indices) for indices in sketch.on_trial), "the test would prove nothing"
    sketch.values = torch.randn(9, len(sketch._owner), generator=torch.Generator().manual_seed(0))
    among, layer_of = [], []
    for number, (q, indices) in enumerate(zip(sketch.q, sketch.on_trial, strict=True)):
        among += [True] * q + [False] * len(indices)
        layer_of += [number] * (q + len(indices))
    sketch.values[:, [not candidate for candidate in among]] += 9.0  # what is on trial is worth much
    sketch.done = sum(sketch.parts[:2]) + 9
    expected = chance(sketch.values, torch.tensor(layer_of), torch.tensor(among), 2.0)
    of_all = chance(sketch.values, torch.tensor(layer_of), torch.ones(len(among), dtype=torch.bool), 2.0)
    assert sketch.chance(2.0) == expected < of_all


def test_a_copy_of_a_model_in_a_trial_has_all_of_its_triples(make_net, train_net, net_batch):
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**EAGER), 18)
    train_net(model, allocator.optimizer, allocator, 10)
    x, _ = net_batch(0)
    theirs = copy.deepcopy(model)
    off = model(x)
    allocator.release()
    assert not torch.allclose(model(x), off), "nothing was on trial: the test would prove nothing"
    assert torch.equal(theirs(x), model(x))
    assert all(layer.a.probe is layer.b.probe is layer.a.energy is None for layer in adapted_layers(theirs))


def test_a_rollback_to_smaller_ranks_goes_on_to_the_next_trial(make_net, train_net):
    """At step 12 a layer grows by more than it has at step 0."""
    model = make_net(r=1)
    allocator = allocate(model, pedyra(**{**EAGER, "moves": 3}), 40)
    before = copy.deepcopy(model.state_dict())
    *_, record = train_net(model, allocator.optimizer, allocator, 12)
    assert any(count > 1 for count in record["added"].values()), "nothing grew: the test would prove nothing"
    model.load_state_dict(before)
    assert [record["step"] for record in train_net(model, allocator.optimizer, allocator, 12, first=13)] == [18, 24]


def test_gradients_that_are_thrown_away_leave_no_trace(make_net, train_net, net_batch):
    """Between two steps of every kind a spike is skipped; the run is the one without them."""
    ended = []
    for spikes in (False, True):
        model = make_net(trained=True)
        config = pedyra(**EAGER)
        allocator = allocate(model, config, 18)
        for step in range(1, 19):
            if spikes:
                x, y = net_batch(1000 + step)
                (1e3 * model(x) - y).square().mean().backward()
                allocator.optimizer.zero_grad()
                allocator.skip_step()
            train_net(model, allocator.optimizer, allocator, 1, first=step)
        assert any(record["pruned"] for record in allocator.history)
        ended.append((allocator.history, model.state_dict()))
    for record in (*ended[0][0], *ended[1][0]):
        del record["seconds"]
    assert ended[0][0] == ended[1][0]
    assert all(torch.equal(ended[1][1][name], value) for name, value in ended[0][1].items())


def test_what_was_read_cannot_be_thrown_away(make_net):
    model = make_net()
    allocator = allocate(model, pedyra(**EAGER), 18)
    allocator.before_step()
    with pytest.raises(ValueError, match="skip_step.. after before_step.. in step 1"):
        allocator.skip_step()


def test_an_adjustment_with_too_little_measured_is_told_and_its_deal_comes_later(make_net, train_net, caplog):
    caplog.set_level(logging.WARNING, "pedyra.allocate.rank_allocator")
    model = make_net()
    allocator = allocate(model, pedyra(**{**EAGER, "reassignment": 6}), 30)
    allocator.go_on_after(4)  # two of six steps are left
    assert inside(allocator).reassign_at == 6
    assert train_net(model, allocator.optimizer, allocator, 2, first=5) == []
    assert "nothing is adjusted after step 6: too few steps" in caplog.text
    assert inside(allocator).reassign_at == 12
    (record,) = train_net(model, allocator.optimizer, allocator, 6, first=7)
    assert record["step"] == 12


def test_the_margin_rises_to_one_over_the_window(make_net, train_net, monkeypatch):
    """As 0.25^(1 - progress)."""
    seen = []

    def look(margin: float, progress: float) -> float:
        seen.append((progress, margin_at(margin, progress)))
        return seen[-1][1]

    monkeypatch.setattr("pedyra.methods.pedyra.run.margin_at", look)
    model = make_net(trained=True)
    allocator = allocate(model, pedyra(**{**EAGER, "margin": 0.25, "patience": 0}), 36)
    train_net(model, allocator.optimizer, allocator, 36)
    assert len(seen) > 2 and seen[-1][1] > seen[0][1]
    assert [margin for _, margin in seen] == pytest.approx([0.25 ** (1 - progress) for progress, _ in seen])


@pytest.mark.parametrize("spike", [1e17, 1e30])
@pytest.mark.parametrize("method", ["ours", "paper"])
def test_a_gradient_spike_leaves_weights_and_new_moments_finite(method, spike, make_net, net_batch):
    model = make_net(trained=True)
    steps = dict(interval=6, initial_warmup=0, final_warmup=3, moves=4)
    given = pedyra(**EAGER) if method == "ours" else {"config": RankConfig.paper(**steps, start="lora")}
    allocator = allocate(model, given, 30)
    old = {id(factor) for factor in allocator.triples()}
    for step in range(1, 31):
        x, y = net_batch(step)
        loss = (model(x) - y).square().mean()
        (loss * (spike if step in (8, 15) else 1.0)).backward()
        allocator.before_step()
        allocator.optimizer.step()
        allocator.optimizer.zero_grad()
        allocator.after_step()
    assert any(record["added"] for record in allocator.history)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for record in allocator.history:
        assert all(math.isfinite(score) for scores in record["scores"].values() for score in scores)
    fresh = [factor for factor in allocator.triples() if id(factor) not in old and factor.requires_grad]
    assert fresh and all(allocator.optimizer.state[factor]["exp_avg"].isfinite().all() for factor in fresh)

"""Fit in a run: the true ranks are found from a wider start, and nothing is cut before anything is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pedyra import RankAllocator, RankConfig
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.distributed import Average, one_process
from pedyra.config import Importance
from pedyra.fitting.calibration import projected
from pedyra.fitting.verdict import Tolerance, won
from pedyra.methods.pedyra.batches import Batches

TRUE = {"a": 2, "b": 0, "c": 3}


def states(allocator: RankAllocator) -> list[str]:
    return [record["fit"]["state"] for record in allocator.history]


def weights(allocator: RankAllocator) -> list[Any]:
    return [factor.detach().clone() for layer in allocator.layers for factor in layer.factors]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_true_ranks_are_found_and_the_budget_with_them(noise, make_task, fit):
    allocator = fit(make_task(noise=noise))
    assert allocator.ranks == TRUE
    last = allocator.history[-1]["fit"]
    assert last["verdict"] == "flat" and last["words"].startswith("flat: r = 6 is 3.6 times")  # 98 of 354 parameters
    assert 0 <= last["spent"] <= last["tolerance"]
    assert all(point["answer"] in ("within", "beyond", "open") for point in last["points"])


def test_what_is_asked_about_is_what_is_cut(make_task, fit, monkeypatch):
    """The function after the cut is the one with the projections, and no weight but those that go has changed."""
    from pedyra.methods.pedyra import run as module

    task, seen = make_task(), []
    original = module.FitRun._cut

    def cut(self, calibration, ranks):
        x = torch.randn(5, 10)
        with projected({self.layers[n]: P for n, P in calibration.projections(ranks).items()}), torch.no_grad():
            seen.append((x, task.model(x)))
        return original(self, calibration, ranks)

    monkeypatch.setattr(module.FitRun, "_cut", cut)
    resized = module.FitRun.resized

    def after(self, replacements):
        if replacements:
            with torch.no_grad():
                seen.append((seen[-1][0], task.model(seen[-1][0])))
        resized(self, replacements)

    monkeypatch.setattr(module.FitRun, "resized", after)
    fit(task)
    assert len(seen) >= 2
    for (_, expected), (_, found) in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_learns_nothing_keeps_everything_and_says_so(make_task, fit):
    allocator = fit(make_task(teaches=False), steps=200)
    assert allocator.ranks == dict.fromkeys(TRUE, 6)
    assert set(states(allocator)) == {"nothing is learned yet"}
    assert "the loss has not fallen beyond its noise" in allocator.history[-1]["fit"]["words"]


def test_until_the_first_cut_it_is_plain_lora_to_the_last_bit(make_task, fit):
    """Measuring and asking change no weight, no moment, and draw no random number."""
    before = torch.get_rng_state()
    asked = fit(make_task(), stop=279)
    assert "asking" in states(asked) and "cut" not in states(asked)
    assert torch.equal(torch.get_rng_state(), _after_a_task(before, make_task))
    only = fit(make_task(), stop=279, moves=0)
    assert all(torch.equal(a, b) for a, b in zip(weights(asked), weights(only), strict=True))


def _after_a_task(state: torch.Tensor, make_task: Any) -> torch.Tensor:
    torch.set_rng_state(state)
    make_task()
    return torch.get_rng_state()


@pytest.mark.parametrize("more", [{"micro": 4}, {"scale": 1024.0}])
def test_accumulation_and_a_loss_scale_change_no_decision(more, make_task, fit):
    plain, other = fit(make_task()), fit(make_task(), **more)
    assert states(plain) == states(other) and plain.ranks == other.ranks
    points = [allocator.history[-1]["fit"]["points"] for allocator in (plain, other)]
    for a, b in zip(*points, strict=True):
        assert (a["parameters"], a["answer"]) == (b["parameters"], b["answer"])
        assert a["measured_cost"] == pytest.approx(b["measured_cost"], rel=0.05, abs=1e-4)


@pytest.mark.parametrize("at", [5, 240, 270, 310])
def test_a_resumed_run_equals_the_unbroken_one(at, make_task, fit, tmp_path):
    """Broken off in the beginning, in a window, while asking, and after a cut."""
    whole = fit(make_task())
    task = make_task()
    part = fit(task, stop=at)
    task.model.save_pretrained(tmp_path)
    save_state(part, tmp_path)
    optimizer = part.optimizer.state_dict()
    again = make_task()

    def resume(allocator: RankAllocator) -> int:
        restore(allocator, tmp_path)
        allocator.optimizer.load_state_dict(optimizer)
        return at

    resumed = fit(again, resume=resume)
    assert resumed.ranks == whole.ranks and states(resumed) == states(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_target_rank_is_met_in_three_cuts_and_asks_nothing(make_task, fit):
    allocator = fit(make_task(), target_rank=2)
    layers = {"a": 22, "b": 19, "c": 18}
    assert 0.85 * 2 * sum(layers.values()) < allocator.parameters <= 2 * sum(layers.values())
    assert states(allocator)[:3] == ["cut"] * 3
    assert "points" not in allocator.history[-1]["fit"]
    assert allocator.ranks["b"] == 0, "the layer that has nothing to learn keeps nothing"


def test_a_target_rank_is_met_with_fewer_adjustments_than_cuts(make_task, fit):
    allocator = fit(make_task(), target_rank=2, interval=140, initial_warmup=10)  # after 150 and 290
    assert states(allocator) == ["cut", "cut"]
    assert allocator.parameters <= 2 * (22 + 19 + 18)


def test_a_schedule_of_one_adjustment_is_told_to_be_in_vain(make_task, fit):
    allocator = fit(make_task(), interval=200, initial_warmup=50)
    assert states(allocator) == ["no time is left"]
    assert "nothing will be cut" in allocator.run.describe()["in_vain"]


def test_nothing_is_asked_once_more_is_spent_than_is_left(make_task, fit):
    """What was won by a later window may be less than by that in which the tolerance was spent."""

    def spend(allocator: Any) -> int:
        allocator.run.account.spent = 10.0
        return 0

    assert states(fit(make_task(), steps=200, stop=130, resume=spend)) == ["nothing may go"]


def test_processes_weigh_asked_batches_as_those_of_the_window(make_task, fit, monkeypatch):
    """Two processes that see the same 64 samples each: every step has 128."""

    class Twins(Average):
        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    monkeypatch.setattr("pedyra.allocate.rank_allocator.averaging", lambda group: Twins(2))
    monkeypatch.setattr("pedyra.allocate.rank_allocator.check_same", lambda *_: None)
    asking: Any = fit(make_task(), steps=200, stop=135).run.asking
    assert len(asking.samples) == 25 and set(asking.samples.tolist()) == {128.0}


def test_a_window_that_begins_too_late_for_the_last_adjustment_ends_with_it(make_task, fit):
    def late(allocator: RankAllocator) -> int:
        last = allocator.schedule.adjustments[-1]
        allocator.go_on_after(last - 1)
        return last - 1

    allocator = fit(make_task(), resume=late)
    assert allocator.history == [] and not allocator.tracks(400)
    assert all(layer.a.observer is None for layer in allocator.layers)


def test_min_rank_is_kept(make_task, fit):
    assert fit(make_task(), min_rank=1).ranks == {**TRUE, "b": 1}


def test_dora_follows(make_task, fit):
    allocator = fit(make_task(use_dora=True))
    assert sum(allocator.ranks.values()) < 18


def test_a_batch_without_a_label_tells_nothing_of_what_was_won():
    rows = [[1.0, 2.0, 4.0], [1.1, 2.1, 4.0], [1.2, 2.2, 4.0]]
    expected = won([[3.0, 4.0], [3.1, 4.0]], rows)
    nothing_seen, broken = [0.0, 0.0, 0.0], [float("nan"), float("nan"), 4.0]
    assert won([[3.0, 4.0], [float("nan"), 4.0], [3.1, 4.0]], [*rows, nothing_seen, broken]) == expected
    assert won([[3.0, 4.0], [3.1, 4.0]], [nothing_seen] * 2) is None


def test_a_fall_that_rounding_makes_is_nothing_learned():
    before, after = 0.6931471824645996, 0.6931471228599548  # neighbours in float32
    found = won([[before, 8.0]] * 4, [[after, before, 8.0]] * 8)
    assert found is not None and found[0] > 0 and not Tolerance(found[0], found[1], 0.1).learned


def test_the_loss_of_a_step_is_that_of_its_labels_where_a_micro_batch_has_none(make_llama):
    model = make_llama(r=2)
    batches = Batches(model, one_process)
    batches.wanted = True
    tokens = torch.tensor([[1, 2, 3, 4]])
    loss = model(input_ids=tokens, labels=tokens).loss
    (loss + model(input_ids=tokens, labels=torch.full_like(tokens, -100)).loss).backward()
    assert batches.losses(None) == [pytest.approx(loss.item(), rel=1e-5), 3]


class TestRefusals:
    def test_no_loss_to_compare(self, make_task):
        task = make_task()
        optimizer = torch.optim.Adam([p for p in task.model.parameters() if p.requires_grad])
        allocator = RankAllocator(task.model, optimizer, RankConfig(), total_steps=100)
        task.model(torch.randn(2, 10)).sum().backward()
        with pytest.raises(ValueError, match="pass labels to the model, or closure"):
            allocator.before_step()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_rank": 6}, "nothing is left to cut; raise lora.r"),
        ],
    )
    def test_what_it_cannot_do(self, settings, message, make_task, fit):
        with pytest.raises(ValueError, match=message):
            fit(make_task(), **settings)

    def test_a_start_that_took_from_the_weight(self, make_task, fit):
        with pytest.raises(ValueError, match="began as a part of the weight"):
            fit(make_task(init_lora_weights="pissa"))

    def test_a_compiled_model(self, make_task):
        task = make_task()
        optimizer = torch.optim.Adam([p for p in task.model.parameters() if p.requires_grad])
        allocator = RankAllocator(task.model, optimizer, RankConfig(), total_steps=100)
        with pytest.raises(ValueError, match="train without torch.compile"):
            allocator.expect_compilation()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"tolerance": 0}, r"rank.tolerance is 0; it is a part of what was won, in \(0, 1\)"),
            ({"tolerance": 1.5}, "rank.tolerance is 1.5"),
            ({"moves": 3}, "rank.moves is 3, of methods that move triples; .* 0 keeps all ranks"),
            (
                {"start": "svd"},
                "rank.start is 'svd', of methods that move triples; leave it out, or take RankC",
            ),
            ({"budget": "ranks"}, "rank.budget is 'ranks', of methods that move triples"),
            ({"max_rank": 8}, "rank.max_rank is 8, but method pedyra lets no layer grow; lower lora.r"),
            ({"importance": Importance(), "budget": "parameters", "target_rank": 2}, "rank.target_rank is 2, a size"),
            ({"importance": Importance()}, "rank.budget is 'fit', of method pedyra"),
            ({"target_rank": 0}, "rank.target_rank is 0"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            RankConfig(**settings)

"""Begin wide, end narrow: the size that is asked for, and nothing is cut that was not measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from windows import adamw

from pedyra import RankAllocator
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.lora.layer import adapted_layers
from pedyra.methods.wide import Wide

TRUE = {"a": 2, "b": 0, "c": 3}
"""Layer -> rank of what the teacher has beyond the base."""
WIDTHS = {"a": 12, "b": 9, "c": 8}
PARAMETERS = {name: 10 + width for name, width in WIDTHS.items()}
"""Of one rank of each layer."""
STEPS = 200
CUTS = [40, 50, 60]
"""After these steps, with the defaults: 30 steps of warm-up, 10 between cuts, each of which measures the 10 before."""
TRAINER: dict[str, Any] = {"max_steps": 40, "learning_rate": 2e-2}
IN_TRAINER = Wide(rank=1, interval=10, initial_warmup=0, final_warmup=5)
"""Cuts after steps 10, 20 and 30 of 40."""


class Heads(nn.Module):
    """Three linears that read the same features, so that none can do another's work."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(10, width) for width in WIDTHS.values())
        self.skipped: set[str] = set()
        """Layers that no token reaches."""

    def forward(self, x: Tensor) -> Tensor:
        layers: dict[str, Any] = {"a": self.a, "b": self.b, "c": self.c}
        outputs = [x.new_zeros(len(x), WIDTHS[n]) if n in self.skipped else layers[n](x) for n in layers]
        return torch.cat(outputs, -1)


@pytest.fixture
def make_heads() -> Callable[..., tuple[Any, nn.Module]]:
    """make_heads(r=6, **LoraConfig settings): a LoRA around `Heads`, and its teacher."""

    def make(r: int = 6, **settings: Any) -> tuple[Any, nn.Module]:
        torch.manual_seed(3)
        base, teacher = Heads(), Heads()
        teacher.load_state_dict(base.state_dict())
        for name, rank in TRUE.items():
            weight: Any = teacher.get_submodule(name).weight
            if rank:
                update = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
                weight.data += update / update.norm() * weight.norm()
        lora = LoraConfig(**{"r": r, "lora_alpha": 2 * r, "target_modules": list(TRUE), **settings})
        torch.manual_seed(4)
        return get_peft_model(base, lora), teacher  # type: ignore[arg-type]

    return make


def batches(teacher: nn.Module, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(32, 10, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        yield step, x, y + 0.1 * torch.randn(y.shape, generator=generator)


def mean_square(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def train(
    heads: tuple[Any, nn.Module], *, stop: int = STEPS, micro: int = 1, scale: float = 1.0, lr: float = 1e-2,
    loss: Callable[[Any, Tensor, Tensor], Tensor] = mean_square,
    resume: Callable[[RankAllocator], int] | None = None, **settings: Any,
) -> RankAllocator:  # fmt: skip
    """By hand, with `Wide(rank=2)`; a step whose gradients are not finite is skipped, as a GradScaler does."""
    model, teacher = heads
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    allocator = RankAllocator(model, optimizer, Wide(**{"rank": 2, **settings}), STEPS)
    first = 0 if resume is None else resume(allocator)
    for _, x, y in batches(teacher, first, stop):
        for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (loss(model, part_x, part_y) * scale / micro).backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, scale)
        allocator.before_step(loss_scale=scale)
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()
        optimizer.zero_grad()
        allocator.after_step()
    return allocator


def weights(allocator: RankAllocator) -> list[Tensor]:
    return [factor.detach().clone() for layer in allocator.layers for factor in layer.factors]


def size(allocator: RankAllocator) -> int:
    return sum(rank * PARAMETERS[name] for name, rank in allocator.ranks.items())


def outcome(allocator: RankAllocator) -> str:
    said = allocator.run.outcome(allocator.situation())
    assert said is not None
    return said


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


class TestTheSize:
    def test_three_cuts_lead_to_the_parameters_of_a_lora_of_the_rank(self, make_heads):
        allocator = train(make_heads())
        target = 2 * sum(PARAMETERS.values())
        assert [record["step"] for record in allocator.history] == CUTS and allocator.run.settled
        assert 0.85 * target < allocator.parameters == size(allocator) <= target
        assert allocator.ranks["b"] == 0, "the layer that has nothing to learn keeps nothing"
        assert "it has the size of a LoRA of rank 2" in outcome(allocator)

    def test_each_cut_leaves_the_same_part(self, make_heads):
        allocator = train(make_heads())
        left = [allocator.initial_parameters, *(record["parameters"] for record in allocator.history)]
        parts = [after / before for before, after in zip(left, left[1:], strict=False)]
        assert parts == pytest.approx([(2 / 6) ** (1 / 3)] * 3, rel=0.15)  # a direction is up to 15 % of the smallest

    def test_fewer_adjustments_than_cuts_lead_there_too(self, make_heads):
        allocator = train(make_heads(), interval=70, initial_warmup=10)  # after steps 80 and 150
        assert len(allocator.history) == 2 and size(allocator) <= 2 * sum(PARAMETERS.values())

    def test_a_training_that_stops_early_says_that_the_size_was_not_reached(self, make_heads):
        allocator = train(make_heads(), stop=45)
        assert size(allocator) > 2 * sum(PARAMETERS.values())
        assert "was not reached: 1 of 3 cuts" in outcome(allocator)

    def test_what_goes_is_worth_nothing_where_the_update_has_the_rank_that_stays(self, make_heads):
        """Every update has rank 1, and no step moves a weight: cut to rank 1, the function is what it was."""
        model, teacher = heads = make_heads(r=4)
        model.get_base_model().eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(len(parameter), 1) @ torch.randn(1, 4) * 0.3
        ((_, x, _),) = batches(teacher, 7, 8)
        before = model(x).detach()
        allocator = train(heads, lr=0.0, rank=1)
        assert allocator.ranks == {"a": 1, "b": 1, "c": 1}
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-3, atol=1e-4)


class TestTheRun:
    def test_until_the_first_cut_it_is_plain_lora_to_the_last_bit(self, make_heads):
        """Measuring changes no weight and no moment, and draws no random number."""
        model, teacher = make_heads()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _, x, y in batches(teacher, 0, CUTS[0] - 1):
            mean_square(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        plain = {name: p for name, p in model.named_parameters() if "lora_" in name}
        state = torch.get_rng_state()
        heads = make_heads()
        train(heads, stop=CUTS[0] - 1)
        ours = dict(heads[0].named_parameters())
        assert all(same_bits(ours[name], weight) for name, weight in plain.items()) and plain
        assert same_bits(torch.get_rng_state(), state)  # `make_heads` seeds; nothing is drawn after it

    @pytest.mark.parametrize("at", [5, 35, 45, 70])
    def test_a_resumed_run_equals_the_unbroken_one(self, at, make_heads, tmp_path):
        """Broken off before anything was measured, inside the first window and the second, and after the cuts."""
        whole = train(make_heads())
        heads = make_heads()
        part = train(heads, stop=at)
        heads[0].save_pretrained(tmp_path)
        save_state(part, str(tmp_path))
        optimizer = part.optimizer.state_dict()

        def resume(allocator: RankAllocator) -> int:
            restore(allocator, str(tmp_path))
            allocator.optimizer.load_state_dict(optimizer)
            return at

        resumed = train(make_heads(), resume=resume)
        assert without_seconds(resumed.history) == without_seconds(whole.history)
        assert all(same_bits(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))

    @pytest.mark.parametrize("more", [{"micro": 4}, {"scale": 1024.0}])
    def test_accumulation_and_a_loss_scale_change_no_cut(self, more, make_heads):
        """The first cut, before which the weights are the same but for rounding."""
        (plain,), (other,) = (train(make_heads(), stop=CUTS[0], **each).history for each in ({}, more))
        assert plain["ranks"] == other["ranks"]
        for name, increases in plain["scores"].items():
            assert other["scores"][name] == pytest.approx(increases, rel=1e-3, abs=1e-7)

    def test_dora_is_cut_too(self, make_heads):
        assert size(train(make_heads(use_dora=True))) <= 2 * sum(PARAMETERS.values())


class TestInATrainer:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"activation_checkpointing": True},
            {"bf16": True},
            {"max_grad_norm": 0.01},
        ],
        ids=["plain", "accumulation", "checkpointing", "bf16", "clipped"],
    )
    def test_a_training_ends_with_the_size_and_says_so(self, arguments, make_trainer, tmp_path):
        trainer, callback = make_trainer(tmp_path, IN_TRAINER, **TRAINER, **arguments)
        trainer.train()
        result = callback.result
        layers = callback.allocator.layers
        target = sum(layer.direction_parameters for layer in layers)  # of rank 1; the LoRA began at 3
        assert 0.8 * target < result.parameters <= target and result.parameters_before == 3 * target
        assert result.adjustments == 3 and max(result.ranks.values()) > 1
        assert f"it has the size of a LoRA of rank 1 ({target:,} parameters)" in str(result)

    def test_what_is_due_after_its_last_cut_is_not_counted(self, make_trainer, tmp_path):
        trainer, callback = make_trainer(tmp_path, IN_TRAINER, **{**TRAINER, "max_steps": 60})
        trainer.train()
        assert len(callback.allocator.schedule.adjustments) == 5
        assert callback.result.adjustments == callback.result.planned == 3

    def test_a_run_whose_layers_all_ended_at_its_rank_resumes(self, make_trainer, make_llama, rows, tmp_path):
        for row in rows:
            row["labels"] = row["input_ids"].clone()
        for resume in (None, str(tmp_path / "checkpoint-33")):
            model = make_llama(target_modules=["1.mlp.down_proj"])  # one layer: where else could a rank go?
            saves = {"save_strategy": "steps", "save_steps": 33}
            trainer, callback = make_trainer(tmp_path, IN_TRAINER, model=model, **TRAINER, **saves)
            trainer.train(resume_from_checkpoint=resume)
            assert list(callback.result.ranks.values()) == [1]

    def test_no_label_in_the_whole_run_keeps_all_ranks_and_is_said(self, make_trainer, make_llama, rows, tmp_path):
        for row in rows:
            row["labels"] = torch.full_like(row["input_ids"], -100)
        trainer, callback = make_trainer(tmp_path, IN_TRAINER, model=make_llama(r=3), **TRAINER)
        trainer.train()
        result = callback.result
        assert set(result.ranks.values()) == {3} and result.adjustments == 0
        assert "too few steps" in str(result) and "was not reached: 0 of 3 cuts" in str(result)


class TestNothingIsCutBlindly:
    @pytest.mark.parametrize("skipped", [{"b"}, {"c"}])
    def test_a_layer_that_no_token_reached_raises_and_is_named(self, skipped, make_heads):
        """An expert of a router that sends it nothing, or a layer that a fused kernel bypasses."""
        heads = make_heads()
        heads[0].get_base_model().skipped = skipped
        with pytest.raises(ValueError, match=f"saw no token in {min(skipped)}, .*: pedyra fit FOLDER"):
            train(heads)
        assert {layer.rank for layer in adapted_layers(heads[0])} == {6}

    def test_an_inner_model_that_is_called_is_measured(self, make_heads):
        """As TRL's distillation does."""

        def inner(model: Any, x: Tensor, y: Tensor) -> Tensor:
            return mean_square(model.get_base_model(), x, y)

        outer, other = train(make_heads()), train(make_heads(), loss=inner)
        assert without_seconds(outer.history) == without_seconds(other.history)

    @pytest.mark.parametrize("skipped", ["nan", "zero"])
    def test_a_window_whose_steps_were_all_skipped_keeps_all_ranks_and_says_so(self, skipped, make_heads, caplog):
        """That of the first cut: the cuts are made one adjustment later."""
        factor = {"nan": float("nan"), "zero": 0.0}[skipped]
        seen = 0

        def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            return mean_square(model, x, y) * (factor if CUTS[0] - 10 < seen <= CUTS[0] else 1.0)

        with caplog.at_level(logging.WARNING, "pedyra.allocate.rank_allocator"):
            allocator = train(make_heads(), loss=loss)
        assert f"nothing is adjusted after step {CUTS[0]}" in caplog.text
        assert [record["step"] for record in allocator.history] == [50, 60, 70]
        assert 0 < size(allocator) <= 2 * sum(PARAMETERS.values())

    @pytest.mark.parametrize("factor", [float("nan"), 0.0])
    def test_a_run_whose_steps_were_all_skipped_does_not_reach_the_size_and_says_so(self, factor, make_heads):
        allocator = train(make_heads(), loss=lambda model, x, y: mean_square(model, x, y) * factor)
        assert allocator.history == [] and allocator.ranks == dict.fromkeys(TRUE, 6)
        assert "was not reached: 0 of 3 cuts" in outcome(allocator)

    def test_one_layer_without_a_finite_gradient_accuses_no_other_of_being_bypassed(self, make_heads):
        def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
            outputs = model(x).split(list(WIDTHS.values()), -1)
            return outputs[0].square().mean() + outputs[1].square().mean() * float("inf")

        assert train(make_heads(), loss=loss).history == []


class TestWhatItCannotDo:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
            ({"rank": 1.5}, "rank is 1.5"),
            ({"rank": True}, "rank is True"),
            ({"interval": 0}, "interval is 0"),
            ({"initial_warmup": -1}, "initial_warmup is -1"),
            ({"final_warmup": 1.0}, "final_warmup is 1.0"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            Wide(**{"rank": 2, **settings})

    @pytest.mark.parametrize(
        ("lora", "settings", "message"),
        [
            ({}, {"rank": 6}, "ends with the 354 parameters of a LoRA of rank 6, .* 354, .*24"),
            ({"r": 1, "rank_pattern": {"c": 4}}, {"rank": 3}, "nothing is left to cut"),  # one layer is wide
            ({}, {"interval": 5}, "interval is 5, but fewer than 10 steps"),
            ({"init_lora_weights": "pissa"}, {}, "began as a part of the weight"),
        ],
    )
    def test_a_run_in_which_nothing_can_be_cut(self, lora, settings, message, make_heads):
        with pytest.raises(ValueError, match=message):
            train(make_heads(**lora), **settings)

    def test_a_compiled_model(self, make_heads):
        model, _ = make_heads()
        allocator = RankAllocator(model, adamw(model), Wide(rank=2), STEPS)
        with pytest.raises(ValueError, match="without torch.compile"):
            allocator.expect_compilation()


class TestInARecipe:
    def test_it_begins_at_four_times_the_rank_and_scales_as_lora_does(self, prepare: Any):
        run = prepare("wide").train()
        assert set(run.allocator.initial_ranks.values()) == {16}  # lora.r is 4
        assert sum(run.allocator.ranks.values()) > 0
        assert run.allocator.parameters <= 4 * sum(layer.direction_parameters for layer in run.allocator.layers)
        assert {layer.scaling for layer in run.allocator.layers} == {32 / 4}

    def test_it_takes_the_schedule_of_a_recipe_that_methods_share(self, prepare: Any):
        config = prepare("wide", rank={"moves": 3, "alpha": 0.3}).adaptation.ranks
        assert config == Wide(rank=4, interval=10, initial_warmup=1, final_warmup=0)
        assert Wide(**json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_the_scaling_is_that_of_the_final_rank(self, use_rslora, prepare: Any):
        lora = {"r": 2, "alpha": 8, "use_rslora": use_rslora}
        plain, wide = (prepare(method, lora=lora).model for method in ("lora", "wide"))
        scalings = [
            {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
            for model in (plain, wide)
        ]
        assert len(scalings[0]) == 1 and [*scalings[0]] == pytest.approx([*scalings[1]])

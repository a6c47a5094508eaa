"""RankAllocator has a method observe a run, and carries out what it decides."""

from __future__ import annotations

import logging
import operator
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan
from pedyra.allocate.contract import Run, method_of
from pedyra.allocate.distributed import Average, check_same
from pedyra.allocate.optimizer_state import (
    TrainedTriples,
    adopt,
    check_held,
    check_optimizer,
    check_state,
    move_state,
    unwrapped,
)
from pedyra.allocate.schedule import Schedule
from pedyra.allocate.scored import ScoredMethod, ScoredRun, ScoredSituation, growth_limits, most_moves
from pedyra.errors import UserError
from pedyra.lora.attach import check_unsharded, write_ranks
from pedyra.lora.factors import AFactor
from pedyra.lora.layer import AdaptedLayer, adapted_layers, holds_triples
from pedyra.lora.layer_names import layer_place
from pedyra.lora.replacement import NewTriples, Replacement, put_replacements, replacements_of
from pedyra.lora.singular import effective_rank, singular_values

logger = logging.getLogger(__name__)

_OWNERS: weakref.WeakKeyDictionary[AFactor, weakref.ref[object]] = weakref.WeakKeyDictionary()
"""The first layer of each adapter that is adapted -> its allocator."""


class RankAllocator:
    """The ranks of one LoRA adapter move by a method, in any training loop.

    Call `before_step()` once the gradients are complete (accumulated, unscaled, clipped) and before
    `optimizer.step()`; call `after_step()` after it, when the gradients are cleared.

    Args:
        model: a PEFT model with a LoRA adapter; triples are attached if they are not yet.
        optimizer: built from the model's parameters; its groups and state are edited in place at a resize. For a method
            that begins with other parameters than the LoRA has (IncreLora, TriAdaptLora) call `method.install(model)`
            before you build it.
        config: the method and its settings: `PeDyra(...)`, say.
        total_steps: optimizer steps of the whole run; fractions in the config refer to it.
        adapter_name: which adapter to adapt; others are left alone.
        process_group: of torch.distributed, whose processes train this model on parts of each batch and average its
            gradients; what they measure is averaged as well. None: all processes, where torch.distributed runs.

    Under DistributedDataParallel make the allocator before you wrap the model, give it the module inside, and wrap that
    anew whenever `after_step` returned a record in which triples moved: the wrapper would go on averaging the old ones.

    Raises:
        ValueError: nothing to adapt, a schedule or budget in which nothing can move, an optimizer whose state cannot
            follow, or an adapter that another allocator already adapts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: ScoredMethod,
        total_steps: int,
        adapter_name: str = "default",
        process_group: Any = None,
    ) -> None:
        self.model, self.adapter_name = model, adapter_name
        method = method_of(config)
        if not isinstance(method, ScoredMethod):
            raise UserError(f"{type(config).__name__} moves no ranks, and has no RankAllocator; use pedyra.adapt")
        self.method = method
        self.optimizer = unwrapped(optimizer)
        check_optimizer(self.optimizer)
        self.schedule: Schedule = self.method.schedule(operator.index(total_steps))
        if self.method.install(model, adapter_name).ranks is None:
            raise UserError(
                f"{type(self.method).__name__} moves no ranks of this adapter, which is PEFT's own; call PEFT's "
                f"update_and_allocate in a loop of your own, or use pedyra.adapt"
            )
        self.layers = trainable(adapted_layers(model, adapter_name))
        check_unsharded(self.layers)
        devices = {str(layer.a.A.device) for layer in self.layers}
        if len(devices) > 1:
            raise UserError(
                f"the adapter's layers lie on {', '.join(sorted(devices))}, but ranks are decided over all layers; "
                f"load the model on one device, with device_map={{'': 0}}"
            )
        self._process_group = process_group
        self.step = 0
        self._read = 0
        self.history: list[dict[str, Any]] = []
        """The records of the adjustments, oldest first; see `after_step`."""
        self.initial_ranks = self.ranks
        self.initial_parameters = self.parameters
        run = Run(model=model, layers=self.layers, schedule=self.schedule, average=Average(process_group))
        limits = growth_limits(self.layers, self.method.max_rank)
        start = self.situation(most_moves(self.method, sum(self.ranks.values())), limits)
        self.method.check(run, start)
        # By `torch.compile(model)`, or by `model.compile()`.
        self._compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
        if self._compiled:
            self._check_compiles()
        check_held(self.optimizer, self.layers)
        other = _OWNERS.get(self.layers[0].a)
        if other is not None and other() is not None:
            raise UserError(f"adapter {adapter_name!r} is already adapted by another RankAllocator; call its release()")
        _OWNERS[self.layers[0].a] = weakref.ref(self)  # after all that may raise: a kept exception would keep it
        for layer in self.layers:
            adopt(self.optimizer, layer)
        self._trained = TrainedTriples(self.layers, self.optimizer)
        self._state_is_known = self._released = False
        self.run: ScoredRun = self.method.begin(run, start)
        """The method in this run."""
        if self._compiled:
            _mark_ranks(self.layers)
        self.run.prepare(0)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank, now."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def parameters(self) -> int:
        """Count the trainable parameters of the adapted triples, now."""
        return sum(layer.parameters for layer in self.layers)

    def triples(self) -> list[Tensor]:
        """Return A, E, B of every layer, now; E may be no Parameter, see `AFactor.train_e`."""
        return self._trained.now

    def expect_compilation(self) -> None:
        """See that changing ranks do not compile again a model that torch will compile: one graph then serves a run,
        two where layer inputs are observed (Eq. 6). Raises ValueError: a method that sees nothing inside of it."""
        self._check_compiles()
        self._compiled = True
        _mark_ranks(self.layers)

    def before_step(self, *, loss_scale: float = 1.0) -> None:
        """Have the method observe the gradients of this optimizer step, and add its own to them (Eq. 2).

        Args:
            loss_scale: of a GradScaler, which does not unscale what hooks see in the backward pass.

        Raises:
            ValueError: a second call in one step, or an adapter of other ranks was loaded since the last one.
        """
        step = self.step + 1
        if self._read == step:
            raise UserError(
                f"before_step() was called twice in step {step}; call after_step() after each optimizer.step()"
            )
        self._read = step
        if self._trained.rekey():
            raise UserError(
                f"the adapter was loaded with other ranks before step {step}, and nothing is known of these; load it "
                f"before RankAllocator is made, or go on from a checkpoint by pedyra.allocate.checkpoint.restore"
            )
        self.run.before_step(step, loss_scale)

    def after_step(self) -> dict[str, Any] | None:
        """Count the step; at an adjustment move triples and the optimizer's state, and return the record, else None.

        The record has `step`, `ranks` (layer -> rank afterwards), `total_rank`, `parameters` (afterwards), `seconds`,
        `skipped_steps`, `scores` (layer -> one a triple, of which the plan was made), `layer_scores` (layer -> mean of
        its scores), `pruned` (layer, triple, score), `added` (layer -> count), and of some `masked` (layer, triple).

        Raises:
            ValueError: `before_step` was not called, or the optimizer's state, which is there from the first step on,
                cannot follow, or processes train apart (`distributed.check_same`).
        """
        self.step = step = self.step + 1
        if self._read != step:
            raise UserError(
                f"after_step() without before_step() in step {step}; call before_step() once the gradients are "
                f"complete and before optimizer.step()"
            )
        if step == self.schedule.total_steps + 1:
            logger.warning(
                "step %d of a run of %d: before_step() and after_step() belong to each optimizer.step(), not to each "
                "micro-batch, and total_steps counts those",
                *(step, self.schedule.total_steps),
            )
        if not self._state_is_known:  # a step that a GradScaler skipped leaves none
            self._state_is_known = any(self.optimizer.state.get(parameter) for parameter in self.triples())
            if self._state_is_known:
                check_state(self.optimizer, self.triples())
        adjusts = step in self.schedule.adjustments
        if adjusts or self._trained.is_new:
            check_same(self.triples(), self._process_group, step)
            self._trained.is_new = False
        record = self._adjust() if adjusts else None
        self.run.prepare(step)
        return record

    def load_state(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from the record and tensors of a checkpoint, once the factors have the saved ranks."""
        self.step, self.history[:] = record["step"], record["history"]
        self.initial_ranks, self.initial_parameters = record["initial_ranks"], record["initial_parameters"]
        self._trained.hold()
        self.run.restart()
        if self._compiled:
            _mark_ranks(self.layers)
        check_state(self.optimizer, self.triples())
        self.run.load(record["method"], tensors)
        self.run.prepare(self.step)

    def release(self) -> None:
        """Take the hooks off and give the adapter free; the triples stay attached.

        Triples that were loaded into the model since the last step (the best checkpoint, a resume in the same
        Trainer) take the place of the old ones in the optimizer, in a second call too, which does nothing else.
        """
        self._trained.rekey()
        if self._released:  # the adapter may be another allocator's by now
            return
        self._released = True
        self.run.release()
        for layer in self.layers if self._compiled else ():
            layer.module.scaling[layer.adapter] = layer.scaling
        if holds_triples(self.layers[0]):  # not deleted since, nor detached
            _OWNERS.pop(self.layers[0].a, None)

    def describe(self) -> dict[str, Any]:
        """Describe the run as it was set up: layers, budget, schedule, config; plain values for JSON."""
        total = sum(self.initial_ranks.values())
        return {
            "kind": "layers",
            "layers": [
                {"name": name, "type": layer_place(name)[0], "depth": layer_place(name)[1], "rank": rank}
                for name, rank in self.initial_ranks.items()
            ],
            "budget": {"kind": self.method.budget, "total_rank": total, "parameters": self.initial_parameters},
            "schedule": {
                **asdict(self.schedule),
                "adjustments": len(self.schedule.adjustments),
                "moves": self.run.moves,
            },
            "config": self.method.to_dict(),
        }

    @torch.no_grad()
    def snapshot(self, *, effective_ranks: bool = True) -> dict[str, Any]:
        """Return diagnostics of the current state (Figs. 1a, 5, 10, 11), for which it waits for the device.

        `grad_norms`, and `layer_scores` that come from observed steps, are None where the current one is not observed,
        and `effective_rank`, which is most of the work, without `effective_ranks`.
        """
        effective = None
        if effective_ranks:
            values = {layer.name: singular_values(layer.a.weight, layer.b.weight) for layer in self.layers}
            effective = {name: effective_rank(each) for name, each in values.items()}
        return {
            "kind": "snapshot",
            "step": self.step,
            "ranks": self.ranks,
            "total_rank": sum(self.ranks.values()),
            "parameters": self.parameters,
            "effective_rank": effective,
            **self.run.snapshot(self.step),
        }

    def situation(self, moves: int, max_ranks: dict[str, int]) -> ScoredSituation:
        """Return what a method is told of the run as it is."""
        return ScoredSituation(
            step=self.step,
            schedule=self.schedule,
            history=self.history,
            ranks=self.ranks,
            initial_ranks=self.initial_ranks,
            parameters={layer.name: layer.direction_parameters for layer in self.layers},
            spare=self.initial_parameters - self.parameters,
            moves=moves,
            min_rank=self.method.min_rank,
            max_ranks=max_ranks,
            budget=self.method.budget,
        )

    def _check_compiles(self) -> None:
        if not self.method.compiles:
            raise UserError(
                f"{type(self.method).__name__} reads gradients inside the layers, where a compiled model shows none; "
                f"train without torch.compile, or with PeDyra(), or train plain LoRA and cut it afterwards: pedyra fit"
            )

    def _adjust(self) -> dict[str, Any] | None:
        """Make and carry out a plan; return its record of plain values, for the history, `ranks.jsonl` and a report."""
        began = time.perf_counter()
        decision = self.run.decide(self.situation(self.run.moves, self.run.max_ranks))
        if decision is None:  # a run was taken up, or weights loaded, too late, or no step had a finite gradient
            logger.warning("nothing is adjusted after step %d: too few steps before it were measured", self.step)
            return None
        plan, scores = decision
        self._carry_out(plan)
        masked = [[name, i] for name, indices in plan.masked.items() for i in indices]
        record = {
            "kind": "adjustment",
            "step": self.step,
            "ranks": plan.ranks,
            "layer_scores": plan.layer_scores,
            "scores": scores,
            "pruned": [[name, i, scores[name][i]] for name, indices in plan.pruned.items() for i in indices],
            "added": plan.added,
            "total_rank": sum(plan.ranks.values()),
            **({"masked": masked} if masked else {}),
            "parameters": self.parameters,
            "seconds": time.perf_counter() - began,
            "skipped_steps": self.run.skipped_steps,
        }
        self.history.append(record)
        return record

    @torch.no_grad()
    def _carry_out(self, plan: RankPlan) -> None:
        replacements = {}
        for layer in self.layers:  # in place: they and their state in the optimizer stay
            layer.a.E[list(plan.masked.get(layer.name, ()))] = 0.0
        if plan.pruned or plan.added or plan.rescale:
            generator = torch.Generator().manual_seed((self.method.seed * 1_000_003 + self.step) % 2**64)
            replacements = resize_layers(plan, self.method.new_triples, self.layers, self.optimizer, generator)
            self._trained.hold()
            if self._compiled:
                _mark_ranks(self.layers)
            write_ranks(self.model, self.adapter_name)
            assert self.ranks == plan.ranks
        self.run.scores.resize(replacements)


def resize_layers(
    plan: RankPlan,
    new_triples: Callable[[AdaptedLayer, int, torch.Generator], NewTriples],
    layers: Sequence[AdaptedLayer],
    optimizer: Optimizer,
    generator: torch.Generator,
) -> Mapping[str, list[Replacement]]:
    """Prune and add as planned, the optimizer's state with it, and bring layers to the plan's scaling; return what was
    replaced, by layer. Every new factor is built, and the optimizer's state checked, before anything is replaced."""
    changes = []
    for layer in layers:
        pruned, num_new = plan.pruned.get(layer.name, ()), plan.added.get(layer.name, 0)
        if pruned or num_new:
            new = new_triples(layer, num_new, generator) if num_new else None
            changes.append((layer, replacements_of(layer, pruned, new)))
    replacements = [replacement for _, change in changes for replacement in change]
    check_state(optimizer, [replacement.old for replacement in replacements])
    put_replacements(changes)
    for layer in layers:
        layer.rescale(layer.scaling * plan.rescale.get(layer.name, 1.0))
    move_state(optimizer, replacements)
    return {layer.name: change for layer, change in changes}


def trainable(layers: Sequence[AdaptedLayer]) -> list[AdaptedLayer]:
    """List the layers that are trained: a frozen one has no gradient to be scored by. ValueError: there is none."""
    result = [layer for layer in layers if layer.a.A.requires_grad and layer.b.weight.requires_grad]
    if not result:
        raise UserError(
            "no layer of the adapter trains both lora_A and lora_B, with which a rank moves; call "
            "model.set_adapter(name) before training, and train plain LoRA where one of them is frozen (LoRA-FA)"
        )
    return result


def _mark_ranks(layers: Sequence[AdaptedLayer]) -> None:
    """Mark the rank dimension of every A, E and B as dynamic, anew after a resize. In the whole process torch no longer
    assumes that a parameter keeps its shape. Ranks 0 and 1 are constants to the compiler, of a graph of their own, and
    so is a number: a scaling that may change is a tensor."""
    import torch._dynamo  # takes a second to import: only who compiles pays

    torch._dynamo.config.force_parameter_static_shapes = False
    for layer in layers:
        if layer.a.doubling is not None:
            layer.module.scaling[layer.adapter] = torch.tensor(layer.scaling, device=layer.a.A.device)
        if layer.rank > 1:
            for parameter, dim in zip(layer.factors, (0, 0, 1), strict=True):
                torch._dynamo.mark_dynamic(parameter, dim)

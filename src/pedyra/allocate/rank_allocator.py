"""RankAllocator: has a method observe a run, and carries out what it decides."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.checks import checked_config, checked_steps, max_ranks
from pedyra.allocate.claim import check_device, choose_forward, claim, give_up, trainable, unobserved_after
from pedyra.allocate.compilation import check_compiles, is_compiled, mark_ranks
from pedyra.allocate.contract import Closure, Decision, MethodRun, RankMethod, Run, Situation, default_method
from pedyra.allocate.diagnostics import describe, snapshot
from pedyra.allocate.distributed import averaging, check_same
from pedyra.allocate.optimizer_checks import check_optimizer, check_state, unwrapped
from pedyra.allocate.optimizer_state import adopt, rekey_state, save_as_on_disk
from pedyra.allocate.orthogonality import add_orthogonality_gradient
from pedyra.allocate.record import adjustment_record
from pedyra.allocate.resizing import carry_out, mask
from pedyra.allocate.schedule import Schedule
from pedyra.allocate.step_count import StepCount
from pedyra.allocate.trained_triples import TrainedTriples
from pedyra.config import RankConfig
from pedyra.lora.attach import attach, drop_empty, train_e, write_ranks

logger = logging.getLogger(__name__)


class RankAllocator:
    """Rank adaptation of one LoRA adapter, for any training loop.

    Call `before_step()` once the gradients are complete (accumulated, unscaled, clipped) and before
    `optimizer.step()`; call `after_step()` after it, when the gradients are cleared.

    Args:
        model: a PEFT model with a LoRA adapter; triples are attached if they are not yet.
        optimizer: built from the model's parameters; its groups and state are edited in place at a resize.
        config: the settings.
        total_steps: optimizer steps of the whole run; fractions in the config refer to it.
        adapter_name: which adapter to adapt; others are left alone.
        method: what decides; that of the config by default (`contract.default_method`).
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
        config: RankConfig,
        total_steps: int,
        adapter_name: str = "default",
        method: RankMethod | None = None,
        process_group: Any = None,
    ) -> None:
        self.model, self.adapter_name, self.config = model, adapter_name, checked_config(config)
        self.method = default_method(config) if method is None else method
        self.optimizer = unwrapped(optimizer)
        check_optimizer(self.optimizer)
        self.schedule: Schedule = self.method.schedule(config, checked_steps(total_steps))
        attached = attach(model, adapter_name, config.start, config.seed)
        rekey_state(self.optimizer, drop_empty(attached))
        self.layers = trainable(attached)
        check_device(self.layers)
        train_e(self.layers, self.method.trains_e(config))
        self.fused_layers = choose_forward(self.layers, config.fused)
        """Layers with the fused forward; the others take PEFT's."""
        self.moves = self.method.most_moves(config, sum(layer.rank for layer in self.layers))
        self._max_ranks = max_ranks(self.layers, config)
        self._steps, self._process_group = StepCount(self.schedule.total_steps), process_group
        self.history: list[dict[str, Any]] = []
        """The records of the adjustments, oldest first; see `allocate.record`."""
        self.initial_parameters = self.parameters
        run = Run(
            model=model, layers=self.layers, optimizer=self.optimizer, config=config, schedule=self.schedule,
            moves=self.moves, average=averaging(process_group),
        )  # fmt: skip
        self.method.check(run, self._situation())
        claim(self.layers, self)
        self._end = unobserved_after(self, self.layers)
        for layer in self.layers:
            adopt(self.optimizer, layer)
        self._trained = TrainedTriples(self.layers, self.optimizer)
        self._saving = save_as_on_disk(self.optimizer)
        self._state_is_known = False
        self.run: MethodRun = self.method.start(run)
        """The method in this run."""
        if (reason := self.run.describe()["in_vain"]) is not None:
            logger.warning("%s", reason)
        self._compiled = False
        if is_compiled(model):
            self.expect_compilation()
        self._prepare_next_step()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._steps.taken

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank, now."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapted triples, now."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def settled(self) -> bool:
        """Whether nothing will move any more: the rest is a plain LoRA of these ranks."""
        return self.run.settled

    def triples(self) -> list[Tensor]:
        """A, E, B of every layer, now; E may be no Parameter, see `AFactor.train_e`."""
        return self._trained.now

    def tracks(self, step: int) -> bool:
        """Whether scores come from what step `step` (1-based) shows."""
        return self.run.observes(step)

    def expect_compilation(self) -> None:
        """The model is or will be compiled by torch: see that changing ranks do not compile it again.

        Called here for a model that is already compiled, and by `RankCallback` for `torch_compile=True`. One
        graph then serves a run, two where layer inputs are observed (Eq. 6).
        """
        check_compiles(self.method)
        self._compiled = True
        mark_ranks(self.layers)

    def before_step(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> None:
        """Have the gradients of this optimizer step observed, then add the gradient of Eq. (2) to them.

        Args:
            loss_scale: what a GradScaler multiplied the loss by. It unscales its optimizer's parameters, but not what
                hooks see in the backward pass.
            closure: for method pedyra where the model is given no labels: `lambda: loss(model(x), y)` of this batch.

        Raises:
            ValueError: a second call in one step, or the adapter was deleted.
        """
        _ = self.layers[0].a  # an adapter that was deleted is told in steps, too, in which nothing else looks
        step = self._steps.begin()
        self._follow_loaded()
        self.run.before_step(step, loss_scale, closure)
        if self.config.orth_weight > 0:
            add_orthogonality_gradient(self.layers, weight=self.config.orth_weight, form=self.config.orth_form)

    def skip_step(self) -> None:
        """Forget gradients that are thrown away (a spike of the loss, say), in the place of the other two calls; else
        they would be part of what the next step shows.

        Raises:
            ValueError: `before_step` has read them already.
        """
        self._steps.skip()
        self.run.skip_step()

    def after_step(self) -> dict[str, Any] | None:
        """Count the step; at an adjustment, prune, expand, move the optimizer's state, and return the record
        (`allocate.record`), else None.

        Raises:
            ValueError: `before_step` was not called, or the optimizer's state, which is there from the first step on,
                cannot follow, or processes train apart (`distributed.check_same`).
        """
        step = self._steps.end()
        if not self._state_is_known:  # a step that a GradScaler skipped leaves none
            self._state_is_known = any(self.optimizer.state.get(parameter) for parameter in self.triples())
            if self._state_is_known:
                if self.moves:
                    check_state(self.optimizer, self.triples())
                self.run.check_state()
        adjusts = self.schedule.is_adjustment(step) and not self.settled
        if adjusts or self._trained.renewed:
            check_same(self.triples(), self._process_group, step)
            self._trained.renewed = False
        record = self._adjust() if adjusts else None
        self._prepare_next_step()
        return record

    def load_state(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from `checkpoint.run_record` and the tensors of its method, once the factors have the saved ranks.

        Raises:
            ValueError: the tensors do not fit these ranks.
        """
        self._steps.taken, self.history = record["step"], record["history"]
        self.initial_parameters, self.moves = record["initial_parameters"], record["moves"]
        self._adopt_triples()
        self.run.load(self.step, record["method"], tensors)
        self._prepare_next_step()

    def go_on_after(self, step: int) -> None:
        """Take a run up after `step` without its state: what is observed, and the history, begin there."""
        self._steps.taken = step
        self._adopt_triples()
        self._prepare_next_step()

    def release(self) -> None:
        """Take the hooks off and give the adapter free; the triples stay attached.

        Triples that were loaded into the model since the last step (the best checkpoint, a resume in the same
        Trainer) take the place of the old ones in the optimizer, which would otherwise train what is gone.
        """
        self._trained.rekey()
        self.run.release()
        for handle in self._saving:
            handle.remove()
        give_up(self.layers)
        self._end.detach()

    def describe(self) -> dict[str, Any]:
        """The run as it was set up: layers, budget, schedule, scaling, config; plain values for JSON."""
        return describe(
            self.layers, self.config, self.schedule, self.initial_parameters, moves=self.moves, **self.run.describe()
        ) | {"fused_layers": self.fused_layers}

    def snapshot(self, *, effective_ranks: bool = True) -> dict[str, Any]:
        """Diagnostics of the current state (Figs. 1a, 5, 10, 11). Not for the step path: it waits for the device.

        `grad_norms`, and `layer_scores` that come from observed steps, are None where the current one is not observed.
        `effective_ranks` are most of the work; without them they are None.
        """
        now = snapshot(self.layers, self.step, form=self.config.orth_form, effective_ranks=effective_ranks)
        return now | self.run.snapshot(self.step)

    def _situation(self) -> Situation:
        return Situation(
            step=self.step, schedule=self.schedule, history=self.history, ranks=self.ranks, moves=self.moves,
            min_rank=self.config.min_rank, max_ranks=self._max_ranks,
            costs={layer.name: layer.cost for layer in self.layers}, spare=self.initial_parameters - self.parameters,
            budget=self.config.budget,
        )  # fmt: skip

    def _adjust(self) -> dict[str, Any] | None:
        began = time.perf_counter()
        now = self._situation()
        decision = self.run.decide(now)
        if decision is None:  # a run was taken up, or weights loaded, too late to measure anything
            logger.warning("nothing is adjusted after step %d: too few steps before it were measured", self.step)
            return None
        self._carry_out(decision)
        seconds, skipped = time.perf_counter() - began, self.run.skipped_steps
        record = adjustment_record(now, decision, parameters=self.parameters, seconds=seconds, skipped_steps=skipped)
        self.history.append(record)
        return record

    def _carry_out(self, decision: Decision) -> None:
        plan, replacements = decision.plan, {}
        mask(self.layers, plan.masked)
        if plan.pruned or plan.added or plan.rescale:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
            replacements = carry_out(
                plan, self.layers, self.optimizer, decision.born, generator, new_moments=decision.new_moments
            )
            self._trained.hold()
            if self._compiled:
                mark_ranks(self.layers)
            write_ranks(self.model, self.adapter_name)
            assert self.ranks == plan.ranks
        self.run.resized(replacements)

    def _adopt_triples(self) -> None:
        """Train the triples that the layers have now, of whatever ranks; nothing is known of them yet."""
        self._trained.hold()
        self.run.restart(self.step)
        if self._compiled:
            mark_ranks(self.layers)

    def _follow_loaded(self) -> None:
        """Go on with an adapter of other ranks that was loaded since the last step; what is observed begins anew."""
        if not self._trained.rekey():
            return
        logger.warning(
            "the adapter was loaded with other ranks before step %d; it is trained from here, and what is observed "
            "begins anew",
            self.step + 1,
        )
        self.initial_parameters = max(self.initial_parameters, self.parameters)
        write_ranks(self.model, self.adapter_name)
        self._adopt_triples()
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        self.run.prepare(self.step)

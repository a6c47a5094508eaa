"""RankAllocator: the one stateful object. Reads gradients before each optimizer step, moves ranks after some."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.compilation import is_compiled, mark_ranks, mark_sketch
from pedyra.allocate.diagnostics import describe, snapshot
from pedyra.allocate.distributed import alone, averaging
from pedyra.allocate.input_energy import InputEnergy
from pedyra.allocate.limits import check_movable, check_room, checked_config, checked_steps, max_ranks, most_moves
from pedyra.allocate.new_triples import new_triples
from pedyra.allocate.optimizer_checks import (
    check_optimizer,
    check_state,
    check_turnable,
    has_second_moments,
    unwrapped,
)
from pedyra.allocate.optimizer_state import adopt, rekey_state, save_as_on_disk
from pedyra.allocate.orthogonality_gradient import add_orthogonality_gradient
from pedyra.allocate.ownership import check_device, choose_forward, claim, give_up, switch_on_after, trainable
from pedyra.allocate.record import adjustment_record
from pedyra.allocate.resizing import carry_out, mask
from pedyra.allocate.rule import Policy, Rule, bidirectional, default_rule, e_is_trained
from pedyra.allocate.schedule import Schedule, ema_window
from pedyra.allocate.scores import ScoreState, TripleScores, own_scores
from pedyra.allocate.situation import moves_due, situation
from pedyra.allocate.trained_triples import TrainedTriples
from pedyra.config import Importance, RankConfig
from pedyra.lora.attach import AdaptedLayer, adapted_layers, attach, drop_empty, train_e, write_ranks
from pedyra.lora.resize import NewTriples
from pedyra.methods.pedyra.dealing import deal, deal_step
from pedyra.methods.pedyra.sketching import Sketching, schedule_of, too_short_to_try
from pedyra.methods.pedyra.trials import choose, how_many, known_curvature, known_lengths, predicted_losses
from pedyra.methods.pedyra.turning import turn_layer

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
        policy: what turns scores into a plan, or a whole Rule; that of the config by default.
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
        policy: Policy | Rule | None = None,
        process_group: Any = None,
    ) -> None:
        self.model, self.adapter_name, self.config = model, adapter_name, checked_config(config)
        policy = default_rule(config) if policy is None else policy
        self.rule = policy if isinstance(policy, Rule) else Rule(policy=policy)
        self.settings = self.rule.settings
        self.optimizer = unwrapped(optimizer)
        check_optimizer(self.optimizer)
        self.schedule: Schedule = schedule_of(config, checked_steps(total_steps), self.settings)
        attached = attach(model, adapter_name, config.start, config.seed)
        rekey_state(self.optimizer, drop_empty(attached))
        self.layers = trainable(attached)
        check_device(self.layers)
        self.trains_e = e_is_trained(self.rule, config)
        train_e(self.layers, self.trains_e)
        self.fused_layers = choose_forward(self.layers, config.fused)
        """Layers with the fused forward; the others take PEFT's."""
        self.moves = most_moves(config, sum(layer.rank for layer in self.layers), tried=self.settings is not None)
        self._max_ranks = max_ranks(self.layers, config)
        self.step = 0
        self._read = 0
        """The last step whose gradients were read: one more than `step` between `before_step` and `after_step`."""
        self.history: list[dict[str, Any]] = []
        """The records of the adjustments, oldest first; see `training.record`."""
        self.initial_parameters = self.parameters
        average = averaging(process_group)
        if average is not alone and self.rule.scores is not None:
            raise ValueError(
                "this method's scores are measured by each process alone, so that processes would decide differently; "
                "train it in one process"
            )
        self._sketching = Sketching(self.layers, config, self.settings, self.schedule, average)
        (self.rule.check or check_movable)(situation(self, self._sketching, self._max_ranks, {}))
        if self.rule.policy is bidirectional:
            check_room(self.layers, config)
        self.deal_step = self._next_deal()
        """The adjustment that deals all ranks anew, if one does."""
        if (reason := too_short_to_try(self.settings, config, self.schedule)) is not None:
            logger.warning("%s", reason)
        claim(self.layers, self)
        self._end = switch_on_after(self, self.layers)
        for layer in self.layers:
            adopt(self.optimizer, layer)
        self._trained = TrainedTriples(self.layers, self.optimizer)
        self._saving = save_as_on_disk(self.optimizer)
        self._state_is_known = False
        self.scores: ScoreState = (self.rule.scores or own_scores)(model, self.layers, config)
        importance = config.importance or Importance(alpha=0.0)
        self._window = ema_window(max(importance.beta1, importance.beta2))
        reads_inputs = self.settings is None and importance.alpha < 1 and self.rule.scores is None
        self._inputs = InputEnergy(model, self.layers, average) if reads_inputs else None
        self._compiled = False
        if is_compiled(model):
            self.expect_compilation()
        self._prepare_next_step()

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank, now."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapted triples, now."""
        return sum(layer.parameters for layer in self.layers)

    def triples(self) -> list[Tensor]:
        """A, E, B of every layer, now; E may be no Parameter, see `AFactor.train_e`."""
        return self._trained.now

    def expect_compilation(self) -> None:
        """The model is or will be compiled by torch: see that changing ranks do not compile it again.

        Called here for a model that is already compiled, and by `RankCallback` for `torch_compile=True`. One
        graph then serves a run, two where layer inputs are observed (Eq. 6); a sketch adds one for each of its parts.
        """
        self._compiled = True
        mark_ranks(self.layers)

    @property
    def scores_observe(self) -> bool:
        """Whether scores come from the steps before (Algorithm 1, another method's), and not from the triples now."""
        return self.settings is None

    def tracks(self, step: int) -> bool:
        """Whether step `step` (1-based) is observed: only the steps an EMA still remembers at an adjustment are."""
        if self.settled or not self.scores_observe:
            return False
        adjustment = self.schedule.next_adjustment(step)
        return adjustment is not None and adjustment - step < self._window

    @property
    def settled(self) -> bool:
        """Whether `patience` adjustments from the deal on moved nothing: the rest is a plain LoRA of these ranks."""
        if self.settings is None or not self.moves or not 0 < self.settings.patience <= len(self.history):
            return False
        last = self.history[-self.settings.patience :]
        if self.deal_step is not None and last[0]["step"] < self.deal_step:
            return False
        return not any(record["pruned"] or record["added"] for record in last)

    def before_step(self, *, loss_scale: float = 1.0) -> None:
        """Observe the gradients of this optimizer step (Eqs. 3 to 6), then add the gradient of Eq. (2) to them.

        Args:
            loss_scale: what a GradScaler multiplied the loss by. It unscales the parameters of its optimizer, but not
                the probes of a sketch, nor what a method's hooks see in the backward pass.

        Raises:
            ValueError: a second call in one step.
        """
        step = self.step + 1
        if self._read == step:
            raise ValueError(
                f"before_step() was called twice in step {step}; call after_step() after each optimizer.step()"
            )
        self._read = step
        self._follow_loaded()
        if self.tracks(step):
            if not self.tracks(step - 1):
                self.scores.restart()
            self.scores.observe_gradients(loss_scale=loss_scale)
            if self._inputs is not None and isinstance(self.scores, TripleScores):
                self.scores.observe_inputs(self._inputs.collect())
        self._sketching.observe(loss_scale)
        if self.config.orth_weight > 0:
            add_orthogonality_gradient(self.layers, weight=self.config.orth_weight, form=self.config.orth_form)

    def skip_step(self) -> None:
        """Forget gradients that are thrown away (a spike of the loss, say), in the place of the other two calls.

        Without it they would be part of the next step's sketch, whose probes no optimizer clears.

        Raises:
            ValueError: `before_step` has read them already.
        """
        if self._read > self.step:
            raise ValueError(
                f"skip_step() after before_step() in step {self._read}, which has read the gradients; decide before it"
            )
        self._sketching.skip()
        if self._inputs is not None:
            self._inputs.forget()

    def after_step(self) -> dict[str, Any] | None:
        """Count the step; at an adjustment, prune, expand, and move the optimizer's state.

        Returns the record of the adjustment (see `training.record`), or None.

        Raises:
            ValueError: `before_step` was not called, or the optimizer's state, which is there from the first step on,
                cannot follow.
        """
        self.step += 1
        if self._read != self.step:
            raise ValueError(
                f"after_step() without before_step() in step {self.step}; call before_step() once the gradients are "
                f"complete and before optimizer.step()"
            )
        if self.step == self.schedule.total_steps + 1:
            logger.warning(
                "step %d of a run of %d: before_step() and after_step() belong to each optimizer.step(), not to each "
                "micro-batch, and total_steps counts those",
                self.step,
                self.schedule.total_steps,
            )
        if not self._state_is_known:
            self._check_state()
        self._begin_trials()
        record = None
        if self.schedule.is_adjustment(self.step) and not self.settled:
            if self._sketching.complete:
                record = self._adjust()
            else:
                self._pass_over()
        self._prepare_next_step()
        return record

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint needs besides the factors: plain values for JSON, and tensors."""
        record = {
            "step": self.step,
            "adapter": self.adapter_name,
            "initial_parameters": self.initial_parameters,
            "moves": self.moves,
            "deal_step": self.deal_step,
            "config": self.config.to_dict(),
            "ranks": self.ranks,
            # Of frozen layers too, which a checkpoint also holds.
            "scaling": {layer.name: layer.scaling for layer in adapted_layers(self.model, self.adapter_name)},
            "history": self.history,
        }
        return record, self.scores.tensors() | self._sketching.tensors()

    def load_state(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, once the factors have the saved ranks.

        Raises:
            ValueError: the tensors do not fit these ranks.
        """
        self._adopt_triples()
        self.scores.load_tensors(tensors)
        self.step, self.history = record["step"], record["history"]
        self.initial_parameters, self.moves = record["initial_parameters"], record["moves"]
        self.deal_step = record["deal_step"]
        if self.deal_step is not None and self.deal_step > self.step:  # of a run that may have had other steps in all
            self.deal_step = self._next_deal()
        self._sketching.load_tensors(tensors, self.step)
        self._prepare_next_step()

    def go_on_after(self, step: int) -> None:
        """Take a run up after `step` without its state: scores, sketch and history begin there."""
        self.step = step
        self._adopt_triples()
        self._prepare_next_step()

    def release(self) -> None:
        """Take the hooks off and give the adapter free; the triples stay attached.

        Triples that were loaded into the model since the last step (the best checkpoint, a resume in the same
        Trainer) take the place of the old ones in the optimizer, which would otherwise train what is gone.
        """
        self._trained.rekey()
        self._sketching.forget()
        if self._inputs is not None:
            self._inputs.remove()
        self.scores.watch(False)
        for handle in self._saving:
            handle.remove()
        give_up(self.layers)
        self._end.detach()

    def describe(self) -> dict[str, Any]:
        """The run as it was set up: layers, budget, schedule, scaling, config; plain values for JSON."""
        return describe(self)

    def snapshot(self, *, effective_ranks: bool = True) -> dict[str, Any]:
        """Diagnostics of the current state (Figs. 1a, 5, 10, 11). Not for the step path: it waits for the device.

        `grad_norms`, and `layer_scores` that come from observed steps, are None where the current one is not tracked.
        `effective_ranks` are most of the work; without them they are None.
        """
        return snapshot(self, effective_ranks)

    def _adopt_triples(self) -> None:
        """Train the triples that the layers have now, of whatever ranks; nothing is known of them yet."""
        self._trained.hold()
        self.scores.restart()
        self._sketching.forget()
        if self._compiled:
            mark_ranks(self.layers)

    def _follow_loaded(self) -> None:
        """Go on with an adapter of other ranks that was loaded since the last step; scores and sketch begin anew."""
        if not self._trained.rekey():
            return
        logger.warning(
            "the adapter was loaded with other ranks before step %d; it is trained from here, and scores and sketch "
            "begin anew",
            self.step + 1,
        )
        self.initial_parameters = max(self.initial_parameters, self.parameters)
        write_ranks(self.model, self.adapter_name)
        self._adopt_triples()
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        if not self.settled:
            self._sketching.prepare(self.step)
        if self._compiled and self._sketching.current is not None:
            mark_sketch(self.layers)
        self.scores.watch(self.tracks(self.step + 1))
        if self._inputs is not None:
            self._inputs.active = self.tracks(self.step + 1)

    def _next_deal(self) -> int | None:
        if self.settings is None:
            return None
        return deal_step(self.layers, self.optimizer, self.settings, self.config, self.schedule, after=self.step)

    def _check_state(self) -> None:
        """What can be said of the optimizer's state only now: it is there from the first step on, not before.

        A step that a GradScaler skipped leaves none.
        """
        parameters = self.triples()
        self._state_is_known = any(self.optimizer.state.get(parameter) for parameter in parameters)
        if not self._state_is_known:
            return
        if not has_second_moments(self.optimizer, parameters):
            if self.deal_step is not None:
                self.deal_step = self._next_deal()
        if self.moves or self.deal_step is not None:
            check_state(self.optimizer, parameters)
        if self.settings is not None and not self.trains_e:
            check_turnable(self.optimizer, parameters)

    def _begin_trials(self) -> None:
        """Switch off what is tried before the next adjustment, when its time has come and something would gain more."""
        sketch = self._sketching.current
        if sketch is None or not sketch.judges:
            return
        adjustment = self.schedule.next_adjustment(self.step + 1)
        assert adjustment is not None
        moves = how_many(self.history, moves_due(self, adjustment))
        if adjustment == self.deal_step or not moves:
            return
        chosen, turns = choose(self.layers, self.config, self.triple_scores, history=self.history, moves=moves)
        sketch.put_on_trial(chosen, turns)

    def triple_scores(self, lengths: Scores | None = None) -> dict[str, list[float]]:
        """The score of every triple by layer, from what was observed so far (Algorithm 1), or measured.

        Args:
            lengths: those of the triples, where they are known.
        """
        if not self.scores_observe:
            lengths = known_lengths(self.layers) if lengths is None else lengths
            return predicted_losses(lengths, known_curvature(self.layers, self.history))
        importance = self.config.importance or Importance()
        return self.scores.triple_scores(
            alpha=importance.alpha,
            score_norm=importance.score_norm,
            input_norm=importance.input_norm,
            omega=importance.omega,
        )

    def _adjust(self) -> dict[str, Any]:
        began = time.perf_counter()
        deals = self.step == self.deal_step
        lengths = {} if self.settings is None else known_lengths(self.layers)
        scores = self.triple_scores(lengths)
        self._sketching.stop()
        now = situation(self, self._sketching, self._max_ranks, lengths)
        if deals:
            scores, plan = deal(self.layers, self.optimizer, now)
        else:
            plan = self.rule.policy(scores, now)
            if turned := self._turn(plan):
                scores = self.triple_scores(lengths | known_lengths(turned))
        self._apply(plan)
        self._sketching.forget()
        record = adjustment_record(
            now,
            scores,
            plan,
            dealt=deals and bool(plan.pruned or plan.added),
            parameters=self.parameters,
            seconds=time.perf_counter() - began,
            skipped_steps=int(self.scores.skipped),
        )
        self.history.append(record)
        return record

    def _pass_over(self) -> None:
        """Leave out an adjustment before which a run was taken up, or weights loaded, too late to measure anything."""
        logger.warning("nothing is adjusted after step %d: too few steps before it were measured", self.step)
        if self.step == self.deal_step:
            self.deal_step = self._next_deal()

    def _turn(self, plan: RankPlan) -> list[AdaptedLayer]:
        """Turn the layers that lose a direction that was on trial; these layers, whose triples are other ones now."""
        turns = {name: W for name, W in self._sketching.turns().items() if name in plan.pruned}
        turned = [layer for layer in self.layers if layer.name in turns]
        for layer in turned:
            turn_layer(layer, self.optimizer, turns[layer.name])
        return turned

    def _apply(self, plan: RankPlan) -> None:
        mask(self.layers, plan.masked)
        if not (plan.pruned or plan.added or plan.rescale):
            return
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)

        def born(layer: AdaptedLayer, pruned: tuple[int, ...], num: int) -> NewTriples:
            if self.rule.new_triples is not None:
                return self.rule.new_triples(layer, num, generator)
            return new_triples(layer, pruned, num, self.config, generator, self._sketching.directions(layer))

        self.scores.resize(carry_out(plan, self.layers, self.optimizer, born, new_moments=self.rule.new_moments))
        self._trained.hold()
        if self._compiled:
            mark_ranks(self.layers)
        write_ranks(self.model, self.adapter_name)
        assert self.ranks == plan.ranks
        if self.rule.policy is bidirectional and self.config.budget == "parameters":
            assert self.parameters <= self.initial_parameters

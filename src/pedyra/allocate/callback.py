"""RankCallback: Trainer's events -> allocator calls. It knows no equation."""

from __future__ import annotations

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from pedyra.allocate.checkpoint import SideFileError, restore, restore_factors, save_state
from pedyra.allocate.checkpoint_folder import check_loaded, end_at_last_step, save_whole
from pedyra.allocate.checks import checked_config
from pedyra.allocate.claim import trainable
from pedyra.allocate.contract import RankMethod, default_method
from pedyra.allocate.distributed import data_parallel, wrap_again
from pedyra.allocate.mean_loss import expect_mean_loss
from pedyra.allocate.optimizer_checks import unwrapped
from pedyra.allocate.optimizer_state import adopt, drop_unfit_state, rekey_state
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.sharded import keep_whole
from pedyra.allocate.trainer_frames import caller, go_first, release_at_error, resumed_from
from pedyra.config import RankConfig
from pedyra.lora.attach import attach, drop_empty, train_e, write_ranks
from pedyra.lora.files import append_row, json_line, read_rows
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.layer_names import layer_place

_CALLBACKS: weakref.WeakSet[RankCallback] = weakref.WeakSet()
"""All that there are; what one of an interrupted training still holds is given up to the next."""


class RankCallback(TrainerCallback):
    """Makes the LoRA training of any `transformers.Trainer` rank-adaptive: `Trainer(..., callbacks=[RankCallback()])`.

    Args:
        config: the settings; `RankConfig()` by default.
        adapter_name: which of the model's adapters to adapt.
        record_to: a JSON-lines file that gets the set-up, a snapshot at every log, and every adjustment; begun anew by
            a training that is no resume.
        resume_from: the checkpoint folder, when it is not the one that Trainer resumes from.
        method: what decides; that of the config by default.

    Every checkpoint gets pedyra's side file, from which `resume_from_checkpoint` continues bit for bit, and appears
    whole or not at all (`checkpoint_folder.save_whole`).

    Raises, when training starts:
        ValueError: nothing to adapt, a schedule in which nothing moves, an unsupported optimizer or wrapper.
    """

    def __init__(
        self,
        config: RankConfig | None = None,
        adapter_name: str = "default",
        record_to: str | Path | None = None,
        resume_from: str | Path | None = None,
        method: RankMethod | None = None,
    ) -> None:
        self.config = RankConfig() if config is None else checked_config(config)
        self.adapter_name = adapter_name
        self.method = default_method(self.config) if method is None else method
        self.record_to = None if record_to is None else Path(record_to)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.allocator: RankAllocator | None = None
        self._tracked_seconds: list[float] = []
        self._wrapper: DistributedDataParallel | None = None
        _CALLBACKS.add(self)
        self._writes = True
        self._attached: list[tuple[AdaptedLayer, tuple[Tensor, ...]]] = []
        """Layers and the triples they had when the callback attached them, until training begins."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before the optimizer is built and before a checkpoint is loaded: slots that take any rank must be there.
        trainer = caller(Trainer)
        self._attach(trainer, kwargs["model"], kwargs.get("optimizer"))
        if trainer is not None and trainer.model_init is not None:
            trainer.model_init = self._attaching(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler, trainer = caller(CallbackHandler), caller(Trainer)
        self._check_alone(() if handler is None else handler.callbacks)
        self._wrapper = data_parallel(args, None if trainer is None else trainer.model_wrapped)
        self._writes = state.is_world_process_zero
        go_first(self)
        if trainer is not None:
            for change in (save_whole, end_at_last_step, release_at_error):
                change(trainer)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._take_over(model)
        self._follow_loaded(optimizer)
        group = None if self._wrapper is None else self._wrapper.process_group
        self.allocator = RankAllocator(
            model, optimizer, self.config, state.max_steps, self.adapter_name, self.method, group
        )
        if args.torch_compile:
            self.allocator.expect_compilation()
        if state.global_step > 0:
            self._resume(self.allocator, args, state.global_step)
        if self._wrapper is not None:  # attaching and resuming may have renewed parameters
            wrap_again(self._wrapper)
        if trainer is not None:
            expect_mean_loss(trainer, model)
        self._start_record(self.allocator, state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.allocator is not None
        scale = _unscale(kwargs["optimizer"])
        began = time.perf_counter()
        self.allocator.before_step(loss_scale=scale)
        if self.allocator.tracks(self.allocator.step + 1):
            self._tracked_seconds.append(time.perf_counter() - began)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.allocator is not None
        record = self.allocator.after_step()
        if record is not None:
            self._record(record)
        if record is not None and self._wrapper is not None and (record["pruned"] or record["added"]):
            wrap_again(self._wrapper)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.allocator is None or logs is None or "loss" not in logs:
            return  # an evaluation or the summary: nothing of ours has changed
        snapshot = self.allocator.snapshot(effective_ranks=self._records)
        self._record(snapshot)
        ours = self._metrics(self.allocator, snapshot)
        logs.update(ours)  # before any reporter sees them: we are called first
        state.log_history[-1].update(ours)

    def write_side_files(self, folder: Path) -> None:
        """Called by `save_whole` once Trainer has written its own files into the folder of a checkpoint."""
        assert self.allocator is not None
        save_state(self.allocator, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.allocator is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore_best(kwargs["model"], Path(state.best_model_checkpoint))
        self.allocator.release()

    def _attach(self, trainer: Trainer | None, model: Any, optimizer: Any = None) -> None:
        if self.adapter_name not in getattr(model, "peft_config", {}):
            return
        layers = attach(model, self.adapter_name, self.config.start, self.config.seed)
        renewed = drop_empty(layers)
        train_e(layers, self.method.trains_e(self.config))
        if optimizer is not None:  # the user's own: before its state is loaded
            rekey_state(unwrapped(optimizer), renewed)
            for layer in trainable(layers):
                adopt(unwrapped(optimizer), layer)
        keep_whole(trainer, model, layers)
        self._attached = [(layer, layer.factors) for layer in layers]

    def _attaching(self, trainer: Trainer) -> Callable[..., Any]:
        """Its `model_init`, whose models take a checkpoint of any ranks."""
        model_init: Any = trainer.model_init

        @functools.wraps(model_init)
        def attached(*args: Any) -> Any:
            model = model_init(*args)
            self._attach(trainer, model)
            return model

        return attached

    def _check_alone(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Raise ValueError where another RankCallback adapts the same adapter, or writes to the same file."""
        others = [each for each in callbacks if isinstance(each, RankCallback) and each is not self]
        if any(each.adapter_name == self.adapter_name for each in others) or callbacks.count(self) > 1:
            raise ValueError(f"callbacks= has two RankCallbacks for adapter {self.adapter_name!r}; pass one")
        if self.record_to is not None and any(each.record_to == self.record_to for each in others):
            raise ValueError(f"two RankCallbacks write to {self.record_to}; give each its own record_to")

    def _take_over(self, model: Any) -> None:
        """Have allocators of this model release it: this callback's, of an earlier `train`, and that of an interrupted
        training with another Trainer, which no one may have in hand; but not one of the same training."""
        handler = caller(CallbackHandler)
        beside = () if handler is None else handler.callbacks
        for callback in [self, *(other for other in _CALLBACKS if other not in beside)]:
            made = callback.allocator
            if made is not None and made.model is model and made.adapter_name == self.adapter_name:
                made.release()

    def _follow_loaded(self, optimizer: Any) -> None:
        """A checkpoint of other ranks was loaded; an optimizer that the user made before still holds the triples that
        were there then, and by now the state that goes with the new ones."""
        for layer, before in self._attached:
            rekey_state(unwrapped(optimizer), {o: n for o, n in zip(before, layer.factors, strict=True) if o is not n})
        self._attached = []

    def _resume(self, allocator: RankAllocator, args: TrainingArguments, step: int) -> None:
        folder = self.resume_from or resumed_from() or Path(str(args.output_dir)) / f"checkpoint-{step}"
        check_loaded(folder)
        try:
            restore(allocator, folder)
        except SideFileError as problem:
            if allocator.method.needs_history:
                raise ValueError(
                    f"{problem}, and this method cannot go on without it; resume from a whole checkpoint, or start anew"
                ) from problem
            warnings.warn(
                f"{problem}. The adapter itself was loaded, but E, scores and history restart: training goes on, not "
                f"as an exact resume",
                stacklevel=2,
            )
            drop_unfit_state(allocator.optimizer, allocator.triples())  # of another checkpoint than the adapter
            write_ranks(allocator.model, allocator.adapter_name)
            allocator.go_on_after(step)

    def _restore_best(self, model: Any, folder: Path) -> None:
        """After `load_best_model_at_end`: Trainer loaded the folded adapter; bring back its split and its config."""
        own = folder / self.adapter_name
        if self.adapter_name != "default" and own.is_dir():  # where Trainer, but for "default", does not look
            model.load_adapter(str(own), self.adapter_name, is_trainable=True)
        try:
            restore_factors(model, folder, self.adapter_name)
        except SideFileError as problem:
            warnings.warn(f"{problem}. The best adapter was loaded with E folded into A", stacklevel=2)
            write_ranks(model, self.adapter_name)

    def _metrics(self, allocator: RankAllocator, snapshot: dict[str, Any]) -> dict[str, float]:
        """Flat numbers for the log: total and mean ranks, scores, orthogonality, cost of a tracked step."""
        by_type: dict[str, list[int]] = {}
        for name, rank in snapshot["ranks"].items():
            by_type.setdefault(layer_place(name)[0], []).append(rank)
        orthogonality = [value for pair in snapshot["orthogonality"].values() for value in pair]
        metrics: dict[str, float] = {
            "ranks/total": snapshot["total_rank"],
            "ranks/parameters": snapshot["parameters"],
            "ranks/skipped_steps": allocator.run.skipped_steps,
            "orthogonality": sum(orthogonality) / len(orthogonality),
        }
        metrics |= {f"ranks/mean_{kind}": sum(ranks) / len(ranks) for kind, ranks in by_type.items()}
        if snapshot["layer_scores"]:
            values = list(snapshot["layer_scores"].values())
            metrics |= {"scores/mean": sum(values) / len(values), "scores/min": min(values), "scores/max": max(values)}
        if self._tracked_seconds:
            metrics["ranks/tracked_step_ms"] = 1000 * sum(self._tracked_seconds) / len(self._tracked_seconds)
            self._tracked_seconds.clear()
        if self.adapter_name != "default":  # beside another's callback
            return {f"{self.adapter_name}/{key}": value for key, value in metrics.items()}
        return metrics

    @property
    def _records(self) -> bool:
        """Whether this process keeps a record."""
        return self.record_to is not None and self._writes

    def _start_record(self, allocator: RankAllocator, step: int) -> None:
        """A new record, or, on a resume, the old one without the lines of steps that will be run again."""
        if self.record_to is None or not self._records:
            return
        known = read_rows(self.record_to, {"step": (int, None)}) if step > 0 else []
        kept = [row for row in known if row.get("step", 0) <= step]
        self.record_to.parent.mkdir(parents=True, exist_ok=True)
        self.record_to.write_text("".join(map(json_line, kept)))
        if not kept:
            self._record(allocator.describe())
            self._record(allocator.snapshot())

    def _record(self, entry: dict[str, Any]) -> None:
        if self.record_to is not None and self._records:
            append_row(self.record_to, entry)


def _unscale(optimizer: Any) -> float:
    """Under fp16 the gradients are scaled until clipping or the step unscales them; with no clipping we come first.

    Returns the scale, 1 without a scaler: one wait for the device, as the scaler's own step has.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):  # clipping has unscaled them: what we want
            raise
    return scaler.get_scale()

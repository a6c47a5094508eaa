"""RankCallback: Trainer's events -> allocator calls. It knows no equation."""

from __future__ import annotations

import inspect
import json
import time
import warnings
from pathlib import Path
from typing import Any, TypeVar

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from pedyra.adapters.attach import attach, train_e, write_ranks
from pedyra.config import RankConfig
from pedyra.files import read_rows
from pedyra.layer_names import layer_place
from pedyra.training.checkpoint import SideFileError, restore, restore_factors, save_state
from pedyra.training.distributed import wrap_again
from pedyra.training.optimizer_state import drop_unfit_state
from pedyra.training.rank_allocator import RankAllocator
from pedyra.training.rule import Policy, Rule, bidirectional


class RankCallback(TrainerCallback):
    """Makes the LoRA training of any `transformers.Trainer` rank-adaptive: `Trainer(..., callbacks=[RankCallback()])`.

    Args:
        config: the settings; `RankConfig()` by default.
        adapter_name: which of the model's adapters to adapt.
        record_to: a JSON-lines file that gets the set-up, a snapshot at every log, and every adjustment.
        resume_from: the checkpoint folder, when it is not `output_dir/checkpoint-<step>`.
        policy: what turns scores into a plan, or a whole Rule; PE-DyRA's by default.

    Every checkpoint gets pedyra's side file, from which `resume_from_checkpoint` continues bit for bit.

    Raises, when training starts:
        ValueError: nothing to adapt, a schedule in which nothing moves, an unsupported optimizer or wrapper.
    """

    def __init__(
        self,
        config: RankConfig | None = None,
        adapter_name: str = "default",
        record_to: str | Path | None = None,
        resume_from: str | Path | None = None,
        policy: Policy | Rule = bidirectional,
    ) -> None:
        self.config = RankConfig() if config is None else config
        self.adapter_name, self.policy = adapter_name, policy
        self.record_to = None if record_to is None else Path(record_to)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.allocator: RankAllocator | None = None
        self._tracked_seconds: list[float] = []
        self._wrapper: DistributedDataParallel | None = None
        self._writes = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before the optimizer is built and before a checkpoint is loaded: slots that take any rank must be there.
        model = kwargs["model"]
        if self.adapter_name in getattr(model, "peft_config", {}):
            train_e(attach(model, self.adapter_name, self.config.start, self.config.seed), bool(self.config.train_e))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = _caller(Trainer)
        self._wrapper = _data_parallel(args, None if trainer is None else trainer.model_wrapped)
        self._writes = state.is_world_process_zero
        _go_first(self)
        if self.allocator is not None:
            self.allocator.release()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.allocator = RankAllocator(
            model,
            optimizer,
            self.config,
            state.max_steps,
            self.adapter_name,
            policy=self.policy,
            process_group=None if self._wrapper is None else self._wrapper.process_group,
        )
        if args.torch_compile:
            self.allocator.expect_compilation()
        if state.global_step > 0:
            self._resume(self.allocator, args, state.global_step)
        if self._wrapper is not None:  # attaching and resuming may have renewed parameters
            wrap_again(self._wrapper)
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
        snapshot = self.allocator.snapshot()
        self._record(snapshot)
        ours = self._metrics(self.allocator, snapshot)
        logs.update(ours)  # before any reporter sees them: we are called first
        state.log_history[-1].update(ours)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.allocator is not None
        if args.should_save:
            trainer = _caller(Trainer)
            folder = args.output_dir if trainer is None else trainer._get_output_dir(getattr(trainer, "_trial", None))
            save_state(self.allocator, Path(str(folder)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.allocator is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore_best(kwargs["model"], Path(state.best_model_checkpoint))
        self.allocator.release()

    def _resume(self, allocator: RankAllocator, args: TrainingArguments, step: int) -> None:
        folder = self.resume_from or Path(str(args.output_dir)) / f"checkpoint-{step}"
        try:
            restore(allocator, folder)
        except SideFileError as problem:
            warnings.warn(
                f"{problem}. The adapter itself was loaded, but E, scores and history restart: training goes on, not "
                f"as an exact resume",
                stacklevel=2,
            )
            drop_unfit_state(allocator.optimizer, allocator.triples())  # rank 0 is on disk as one zero row
            write_ranks(allocator.model, allocator.adapter_name)
            allocator.go_on_after(step)

    def _restore_best(self, model: Any, folder: Path) -> None:
        """After `load_best_model_at_end`: Trainer loaded the folded adapter; bring back its split and its config."""
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
            "ranks/skipped_steps": int(allocator.scores.skipped),
            "orthogonality": sum(orthogonality) / len(orthogonality),
        }
        metrics |= {f"ranks/mean_{kind}": sum(ranks) / len(ranks) for kind, ranks in by_type.items()}
        if snapshot["layer_scores"]:
            values = list(snapshot["layer_scores"].values())
            metrics |= {"scores/mean": sum(values) / len(values), "scores/min": min(values), "scores/max": max(values)}
        if self._tracked_seconds:
            metrics["ranks/tracked_step_ms"] = 1000 * sum(self._tracked_seconds) / len(self._tracked_seconds)
            self._tracked_seconds.clear()
        return metrics

    def _start_record(self, allocator: RankAllocator, step: int) -> None:
        """A new record, or, on a resume, the old one without the lines of steps that will be run again."""
        if self.record_to is None or not self._writes:
            return
        kept = [row for row in read_rows(self.record_to) if row.get("step", 0) <= step] if step > 0 else []
        self.record_to.parent.mkdir(parents=True, exist_ok=True)
        self.record_to.write_text("".join(json.dumps(row) + "\n" for row in kept))
        if not kept:
            self._record(allocator.describe())
            self._record(allocator.snapshot())

    def _record(self, entry: dict[str, Any]) -> None:
        if self.record_to is not None and self._writes:
            with self.record_to.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def _go_first(callback: TrainerCallback) -> None:
    """Move `callback` before Trainer's reporters, so that they get its numbers together with the loss.

    Second instances of the reporters would open runs of their own (TensorBoard, DVCLive), and Trainer hands a
    callback everything but the handler that is calling it; so that is looked up in the calling frames. Moving an
    entry to the front while the handler iterates over the list neither skips nor repeats another one.
    """
    handler = _caller(CallbackHandler)
    if handler is not None:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


Caller = TypeVar("Caller")


def _caller(kind: type[Caller]) -> Caller | None:
    """The nearest object of this kind whose method is running."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back
    return None


def _data_parallel(args: TrainingArguments, wrapped: Any) -> DistributedDataParallel | None:
    """The wrapper that averages gradients, which must follow a resize; None for one process.

    Raises:
        ValueError: another wrapper; a resize inside it would diverge or crash.
    """
    wrapper = None
    if args.deepspeed:
        wrapper, repair = "DeepSpeed", "train without args.deepspeed"
    elif getattr(args, "fsdp", None):
        wrapper, repair = "FSDP", "train without args.fsdp"
    elif args.world_size > 1 and not isinstance(wrapped, DistributedDataParallel):
        kind = type(wrapped).__name__
        wrapper, repair = f"{args.world_size} processes in a {kind}", "use DDP, without torch_compile, or one process"
    elif args.n_gpu > 1:
        wrapper, repair = f"DataParallel over {args.n_gpu} GPUs", "set CUDA_VISIBLE_DEVICES to one of them"
    if wrapper is not None:
        raise ValueError(f"RankCallback does not support training under {wrapper} yet; {repair}")
    return wrapped if isinstance(wrapped, DistributedDataParallel) else None


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

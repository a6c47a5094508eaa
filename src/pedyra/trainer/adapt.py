"""`pedyra.adapt(trainer, method)`: Trainer's events become calls of a method's `Work` and of a RankAllocator. It knows
no equation and no method by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import number_of_arguments

from pedyra.allocate.allocation import stayed
from pedyra.allocate.checkpoint import SideFileError, restore, restore_factors, save_state
from pedyra.allocate.contract import Method, Work, acts, method_of
from pedyra.allocate.distributed import wrap_again
from pedyra.allocate.optimizer_state import adopt, rekey_state, unwrapped
from pedyra.allocate.rank_allocator import RankAllocator, trainable
from pedyra.allocate.scored import ScoredMethod
from pedyra.errors import UserError
from pedyra.fitting.modes import use_averaged
from pedyra.lora.files import append_row, json_line, read_rows, write_file
from pedyra.lora.layer import AdaptedLayer, adapted_layers
from pedyra.lora.layer_names import layer_place
from pedyra.trainer.changes import end_at_last_step, put_around, watch_batches, watch_training
from pedyra.trainer.checkpoint_folder import check_loaded
from pedyra.trainer.checkpoints import save_whole
from pedyra.trainer.engines import check_engine, data_parallel, keep_whole, reshard
from pedyra.trainer.upcoming import upcoming

logger = logging.getLogger(__name__)

IGNORED = -100
"""A label that no loss counts, as transformers marks it."""
MANY = 30
"""Parameters a label. A phone book that is learned by heart, where ranks decide, has 24 at r = 2, and QNLI, where they
do not, 76 at r = 8."""
WHERE = "https://pedyra.github.io/pedyra/evidence"


def adapt(
    trainer: Trainer,
    method: Method,
    *,
    adapter: str = "default",
    record_to: str | Path | None = None,
) -> MethodTraining:
    """Have a Trainer train its LoRA by a method. Call it once the Trainer is made, and before `train()`.

    Any Trainer of transformers or TRL will do, with `model_init` too. What is changed in it stands in
    `pedyra.trainer.changes`. The method begins with the LoRA that the model has, and gets what it needs before the
    first step: slots, an optimizer, a search on rows of the training. When the training has ended the adapter is an
    ordinary LoRA. From a checkpoint `resume_from_checkpoint` continues bit for bit; those of a method that moves ranks
    have pedyra's side file.

    Args:
        method: the method and its settings, such as `PeDyra()`, `AdaLora(final_rank=8)` or `Sora()`.
        adapter: which of the model's adapters to adapt.
        record_to: a JSON-lines file that gets the set-up, a snapshot at every log, and every adjustment of a method
            that moves ranks; begun anew by a training that is no resume.

    Returns:
        A handle. When a training that moves ranks has ended, its `result` says what became of them, and one line of it
        is printed.

    Raises:
        ValueError: the model has no such adapter, or one that the method cannot begin with; the Trainer is adapted
            already, training has begun, arguments that the method cannot train under, an engine that cuts the adapter
            into pieces. When training starts: a schedule in which nothing moves, an unsupported optimizer or wrapper.
    """
    method = method_of(method)
    if not isinstance(trainer, Trainer):
        raise UserError(f"adapt takes a Trainer of transformers or TRL, and {type(trainer).__name__} is none")
    if trainer.state.global_step > 0:
        raise UserError(
            f"training has begun ({trainer.state.global_step} steps), so ranks cannot be adapted in it any more; call "
            f"adapt before train()"
        )
    if any(isinstance(each, MethodTraining) for each in trainer.callback_handler.callbacks):
        raise UserError("this Trainer is adapted already; call adapt once")
    handle = MethodTraining(trainer, method, adapter, record_to)
    check_engine(trainer)
    # Before the optimizer is built and before a checkpoint is loaded: slots that take any rank must be there.
    handle.install(trainer.model)
    if trainer.model_init is not None:
        trainer.model_init = handle.installing(trainer.model_init)
    for change in (end_at_last_step, save_whole):
        change(trainer)
    watch_batches(trainer, handle.first_batches)
    if acts(handle.work, "make_optimizer"):
        put_around(trainer, "create_optimizer", handle.create_optimizer)
    watch_training(trainer, handle.training_begins, handle.release)
    trainer.callback_handler.callbacks.insert(0, handle)  # before the reporters, whose log gets its numbers
    return handle


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """A training has moved ranks. `print` gives the line that is said at its end.

    `pruned` and `added` count the triples of all adjustments, and `ranks_before` is of the start of the run.
    """

    steps: int
    adjustments: int
    planned: int
    """The schedule has this number of adjustments, of which some may not have come."""
    first: int
    """The first adjustment is due after this step."""
    pruned: int
    added: int
    stayed: int
    """So many of the added triples are there at the end. Where most are gone again, adjustments follow each other so
    fast that a new triple has not learned anything yet."""
    ranks_before: dict[str, int]
    ranks: dict[str, int]
    parameters_before: int
    parameters: int

    def __str__(self) -> str:
        if self.steps < self.first:
            words = (
                f"no rank moved: training ended after {self.steps} steps, and the first adjustment follows step "
                f"{self.first}; train longer, or shorten initial_warmup and interval"
            )
        elif self.adjustments == 0:
            words = (
                "no rank moved: before every adjustment that was due too few steps had a loss that is a number, labels "
                "and a gradient"
            )
        elif self.pruned == self.added == 0:
            words = f"no rank moved in {self.adjustments} adjustments"
        else:
            changed = sum(self.ranks[name] != rank for name, rank in self.ranks_before.items())
            low, high = min(self.ranks.values()), max(self.ranks.values())
            words = (
                f"{self.adjustments} of {self.planned} adjustments pruned {self.pruned} triples and added "
                f"{self.added} ({self.stayed} of them stayed): the rank of {changed} of {len(self.ranks)} layers "
                f"changed, ranks go from {low} to {high}, and the number of parameters went from "
                f"{self.parameters_before:,} to {self.parameters:,}"
            )
            if 2 * self.stayed < self.added:
                words += "; most of what was added was taken back, so lower moves or lengthen interval"
        return words


class MethodTraining(TrainerCallback):
    """`adapt` returns it: it hands Trainer's events to the method's work, and to the RankAllocator of each training
    where the method moves ranks."""

    work: Work
    """The method acts by it in the Trainer's model."""
    preparation_seconds: float
    """To install the method took so long: AutoLoRA's search."""

    def __init__(self, trainer: Trainer, method: Method, adapter: str, record_to: str | Path | None) -> None:
        self.trainer, self.method, self.adapter = trainer, method, adapter
        self.record_to = None if record_to is None else Path(record_to)
        self.allocator: RankAllocator | None = None
        """The last training has it; None before the first, and where ranks stay."""
        self.trained_parameters = 0
        """The last training changed so many at its end."""
        self._result: RankResult | None = None
        self._wrapper: DistributedDataParallel | None = None
        self._counts_labels = self._warns_of_ratio = False
        self._resumes_from: Path | None = None
        self._writes = True
        self._over = False
        """The method has made its adapter an ordinary one."""
        self._attached: list[tuple[AdaptedLayer, tuple[Tensor, ...]]] = []
        """Until training begins, the layers stand here with the triples that they had when they were attached."""

    @property
    def result(self) -> RankResult:
        """Return what the last training did to the ranks.

        Raises:
            ValueError: no training that moves ranks has ended yet.
        """
        if self._result is None:
            raise UserError("result is known when a training that moves ranks has ended; call trainer.train() first")
        return self._result

    def training_begins(self, checkpoint: Path | None) -> None:
        """Remember the checkpoint from which a training goes on; None: it begins anew. Raises ValueError: the method
        cannot begin a second time, or not from there."""
        name = type(self.method).__name__
        if self._over:
            raise UserError(f"{name} has ended, and its adapter is an ordinary LoRA; make a new model and Trainer")
        if checkpoint is not None and not self.work.resumable:
            raise UserError(
                f"{name} of PEFT's AdaLoRA cannot go on from a checkpoint; begin anew, or from a LoraConfig"
            )
        self._resumes_from = checkpoint

    def release(self) -> None:
        """Leave nothing of a training in the model, at its end and where an exception ends it."""
        if self.allocator is not None:
            self.allocator.release()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._wrapper = data_parallel(args, self.trainer.model_wrapped)
        self._writes = state.is_world_process_zero
        divides = self.trainer.model_accepts_loss_kwargs
        if self.work.ranks is not None:
            self._ranks_begin(self.work.ranks, args, state, kwargs["model"], kwargs["optimizer"])
        # Trainer multiplies such a loss by their number, since the gradient is averaged over them.
        processes = args.world_size if args.average_tokens_across_devices else 1
        self.work.begin(state.max_steps, args.gradient_accumulation_steps * processes if divides else 1)

    def _ranks_begin(self, method: ScoredMethod, args: Any, state: Any, model: Any, optimizer: Any) -> None:
        self.release()  # a second training may have loaded a checkpoint, which its optimizer has to follow
        self._follow_loaded(optimizer)
        group = None if self._wrapper is None else self._wrapper.process_group
        self.allocator = RankAllocator(model, optimizer, method, state.max_steps, self.adapter, group)
        if args.torch_compile:
            self.allocator.expect_compilation()
        if self._resumes_from is not None and state.global_step > 0:
            self._resume(self.allocator, self._resumes_from)
        if self._wrapper is not None:  # attaching and resuming may have renewed parameters
            wrap_again(self._wrapper)
        self._counts_labels = self._warns_of_ratio = True
        self._start_record(self.allocator, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.work.step_begins(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.allocator is not None:
            self.allocator.before_step(loss_scale=_unscale(kwargs["optimizer"]))

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self.work.stepped(state.global_step, skipped=skipped)  # Trainer counts the step only later

    def on_step_end(self, args, state, control, **kwargs) -> None:
        record = None if self.allocator is None else self.allocator.after_step()
        if record is not None:
            self._record(record)
        if record is not None and self._wrapper is not None and (record["pruned"] or record["added"]):
            wrap_again(self._wrapper, init_sync=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.allocator is None or logs is None or "loss" not in logs:
            return  # an evaluation or the summary: nothing of ours has changed
        snapshot = self.allocator.snapshot(effective_ranks=self._records)
        self._record(snapshot)
        self._warn_of_ratio(snapshot)
        ours = self._metrics(self.allocator, snapshot)
        logs.update(ours)  # before any reporter sees them: we are called first
        state.log_history[-1].update(ours)

    def write_side_files(self, folder: Path) -> None:
        """Write ours, as `save_whole` asks once Trainer has written its own files into the folder of a checkpoint."""
        if self.allocator is not None:
            save_state(self.allocator, folder)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        model: Any = kwargs["model"]
        if self.allocator is not None:
            self._ranks_end(self.allocator, args, state, model)
        self.trained_parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
        if acts(self.work, "end"):
            reshard(model)
            use_averaged(kwargs.get("optimizer"))  # a schedule-free optimizer has two sets of weights
            self.work.end()
            self._over = True

    def _ranks_end(self, allocator: RankAllocator, args: Any, state: Any, model: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore_best(model, Path(state.best_model_checkpoint))
        self._result = self._conclude(allocator)
        self.release()
        self._tell(str(self._result))

    def _tell(self, line: str) -> None:
        if not self._writes:
            return
        logger.info("%s", line)
        if not self.trainer.args.disable_tqdm:  # where Trainer prints its progress
            tqdm.write(f"pedyra: {line}")  # on a line of its own

    def first_batches(self, samples: list[Any]) -> None:
        """Say, from the micro-batches of the first step, how much there is to learn from beside what is trained."""
        if not (self._counts_labels and samples and self.allocator is not None):
            return
        self._counts_labels = False
        labels = [each["labels"] for each in samples if isinstance(each, Mapping) and "labels" in each]
        if not labels or not all(isinstance(each, Tensor) and each.ndim for each in labels):
            return  # a Trainer that is judged by something else
        rows = sum(len(each) for each in labels)
        answers = sum(int((each != IGNORED).sum()) for each in labels)
        count = rows * self.trainer.args.world_size * self.trainer.state.max_steps
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "__len__"):
            count = min(count, len(dataset))  # type: ignore[arg-type]
        about, parameters = round(count * answers / rows), self.allocator.parameters
        line = f"the adapter has {parameters:,} parameters, to learn from about {about:,} labels or answer tokens"
        if parameters > MANY * about:
            line += f"; with so many more parameters than labels it hardly matters where the ranks are: {WHERE}"
        self._tell(line)

    def _warn_of_ratio(self, snapshot: Mapping[str, Any]) -> None:
        ratio = snapshot.get("orthogonality_ratio", 0.0)
        if self._warns_of_ratio and ratio > 1:
            self._warns_of_ratio = False
            logger.warning(
                "the gradient of Eq. (2) is %.1f times that of the task (the median so far), so A and B follow it and "
                "hardly learn; set orth_weight=0, as PeDyra() has it, or a smaller one",
                ratio,
            )

    def _conclude(self, allocator: RankAllocator) -> RankResult:
        history, planned = allocator.history, allocator.schedule.adjustments
        return RankResult(
            steps=allocator.step,
            adjustments=len(history),
            planned=len(planned),
            first=planned[0],
            pruned=sum(len(record["pruned"]) for record in history),
            added=sum(sum(record["added"].values()) for record in history),
            stayed=stayed(history),
            ranks_before=allocator.initial_ranks,
            ranks=allocator.ranks,
            parameters_before=allocator.initial_parameters,
            parameters=allocator.parameters,
        )

    def install(self, model: Any) -> None:
        """Give the adapter what the method trains, and the triples that are trained to the Trainer's optimizer, if it
        has one. Raises ValueError: as `adapt` does."""
        before = time.perf_counter()
        self.work, self._over = self.method.install(model, self.adapter, upcoming(self.trainer)), False
        self.preparation_seconds = time.perf_counter() - before
        name = type(self.method).__name__
        optimizer: Any = self.trainer.optimizer
        for key, reason in self.work.refused.items():
            if value := getattr(self.trainer.args, key):
                raise UserError(f"the training has {key}={value!r}, but {reason}")
        if optimizer is not None and acts(self.work, "make_optimizer"):
            raise UserError(f"the Trainer has an optimizer, and {name} makes its own; leave out optimizers=")
        layers = adapted_layers(model, self.adapter)
        if optimizer is not None:  # the user's own: before its state is loaded
            try:
                for layer in trainable(layers) if layers else ():
                    adopt(unwrapped(optimizer), layer)
            except UserError as error:
                raise UserError(f"{error}; {name} begins with parameters of its own: leave out optimizers=") from None
        keep_whole(self.trainer, model, layers)
        self._attached = [(layer, layer.factors) for layer in layers]

    def installing(self, model_init: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a Trainer's `model_init`, whose models take a checkpoint of any ranks."""

        def installed(*args: Any) -> Any:
            model = model_init(*args)
            self.trainer.optimizer = None  # it was the model before's; Trainer makes it anew after this
            self.install(model)
            return model

        # Trainer counts the arguments, those of a functools.partial otherwise than a signature does.
        return (lambda: installed()) if number_of_arguments(model_init) == 0 else (lambda trial: installed(trial))

    def create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the method's optimizer where Trainer would make its own."""
        trainer: Any = self.trainer
        if trainer.optimizer is None:
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            trainer.optimizer = self.work.make_optimizer(kind, arguments, trainer.args.weight_decay)
        return original(*args, **kwargs)

    def _follow_loaded(self, optimizer: Any) -> None:
        """Point an optimizer that the user made at the Parameters of a checkpoint of other ranks, which Trainer has
        loaded since; it has their state already, under the old ones."""
        for layer, before in self._attached:
            rekey_state(unwrapped(optimizer), {o: n for o, n in zip(before, layer.factors, strict=True) if o is not n})
        self._attached = []

    def _resume(self, allocator: RankAllocator, folder: Path) -> None:
        check_loaded(folder)
        try:
            restore(allocator, folder)
        except SideFileError as problem:
            raise UserError(
                f"{problem}, and ranks cannot go on without it; resume from a whole checkpoint, or begin a new "
                f"training with the adapter of this one"
            ) from problem

    def _restore_best(self, model: Any, folder: Path) -> None:
        """Restore A, E and the ranks of the best checkpoint, of which Trainer loads only the product E A, as PEFT
        saves it."""
        own = folder / self.adapter
        if self.adapter != "default" and own.is_dir():  # Trainer looks there for "default" alone
            model.load_adapter(str(own), self.adapter, is_trainable=True)
        restore_factors(model, folder, self.adapter)

    def _metrics(self, allocator: RankAllocator, snapshot: dict[str, Any]) -> dict[str, float]:
        """Make flat numbers for the log: ranks and scores, by module type too, and orthogonality."""
        metrics: dict[str, float] = {
            "ranks/total": snapshot["total_rank"],
            "ranks/parameters": snapshot["parameters"],
            "ranks/skipped_steps": allocator.run.skipped_steps,
        }
        if "orthogonality" in snapshot:  # Eq. (2), of methods that know it
            values = [value for pair in snapshot["orthogonality"].values() for value in pair]
            metrics["orthogonality"] = sum(values) / len(values)
        if "orthogonality_ratio" in snapshot:
            metrics["orthogonality_ratio"] = snapshot["orthogonality_ratio"]
        metrics |= _means_by_type("ranks", snapshot["ranks"])
        if scores := snapshot["layer_scores"]:
            values = scores.values()
            metrics |= {"scores/mean": sum(values) / len(values), "scores/min": min(values), "scores/max": max(values)}
            metrics |= _means_by_type("scores", scores)
        return metrics

    @property
    def _records(self) -> bool:
        """Tell whether this process keeps a record."""
        return self.record_to is not None and self._writes

    def _start_record(self, allocator: RankAllocator, step: int) -> None:
        """Begin a new record. A resume goes on with the old one, without the lines of steps that run again, and with
        adjustments of the checkpoint that the file lacks."""
        if self.record_to is None or not self._records:
            return
        rows_before = read_rows(self.record_to, {"step": (int, None)}) if step > 0 else []
        earlier = [row for row in rows_before if (row.get("step") or 0) <= step]
        recorded = {row["step"] for row in earlier if row.get("kind") == "adjustment"}
        lost = [record for record in allocator.history if record["step"] not in recorded]
        rows = sorted([*(earlier or [allocator.describe()]), *lost], key=lambda row: row.get("step") or 0)
        self.record_to.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.record_to, "".join(map(json_line, rows)))
        if not earlier:
            self._record(allocator.snapshot())

    def _record(self, entry: dict[str, Any]) -> None:
        if self.record_to is not None and self._records:
            append_row(self.record_to, entry)


def _means_by_type(prefix: str, of_layers: Mapping[str, float]) -> dict[str, float]:
    """Average what layers have over those of each module type."""
    by_type: dict[str, list[float]] = {}
    for name, value in of_layers.items():
        by_type.setdefault(layer_place(name)[0], []).append(value)
    return {f"{prefix}/mean_{kind}": sum(values) / len(values) for kind, values in by_type.items()}


def _unscale(optimizer: Any) -> float:
    """Unscale the gradients of fp16, which stay scaled until clipping or the step: with no clipping we come first.

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

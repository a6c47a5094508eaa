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
from pedyra.trainer.changes import end_at_last_step, put_around
from pedyra.trainer.checkpoint_folder import check_loaded
from pedyra.trainer.checkpoints import save_whole
from pedyra.trainer.engines import check_engine, data_parallel, keep_whole, reshard
from pedyra.trainer.upcoming import upcoming

logger = logging.getLogger(__name__)

IGNORED = -100
"""A label that no loss counts, as transformers marks it."""
MANY = 30
"""Parameters a label: a phone book, where ranks decide, has 24 at r = 2, and QNLI, where they do not, 76 at r = 8."""
WHERE = "https://pedyra.github.io/pedyra/evidence"


def adapt(
    trainer: Trainer, method: Method, *, adapter: str = "default", record_to: str | Path | None = None
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
        trainer.model_init = handle.model_maker(trainer.model_init)
    end_at_last_step(trainer)
    save_whole(trainer)
    put_around(trainer, "get_batch_samples", handle.first_batches)
    if acts(handle.work, "make_optimizer"):
        put_around(trainer, "create_optimizer", handle.create_optimizer)
    put_around(trainer, "_inner_training_loop", handle.training)
    trainer.callback_handler.callbacks.insert(0, handle)  # before the reporters, whose log gets its numbers
    return handle


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """A training has moved ranks; `print` gives a line. `pruned` and `added` count the triples of all adjustments, and
    `ranks_before` is of the start of the run."""

    steps: int
    adjustments: int
    planned: int
    """The schedule has this number of adjustments, of which some may not have come."""
    first: int
    """The first adjustment is due after this step."""
    pruned: int
    added: int
    stayed: int
    """So many of the added triples are there at the end; where most are gone, adjustments follow too fast."""
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
            words = (
                f"{self.adjustments} of {self.planned} adjustments pruned {self.pruned} triples and added "
                f"{self.added} ({self.stayed} of them stayed): the rank of {changed} of {len(self.ranks)} layers "
                f"changed, ranks go from {min(self.ranks.values())} to {max(self.ranks.values())}, and the number of "
                f"parameters went from {self.parameters_before:,} to {self.parameters:,}"
            )
            if 2 * self.stayed < self.added:
                words += "; most of what was added was taken back, so lower moves or lengthen interval"
        return words


class MethodTraining(TrainerCallback):
    """`adapt` returns it: Trainer's events go to the method's work, and to the RankAllocator of each training in which
    ranks move."""

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
        """Layers with the triples that they had when they were attached, until training begins."""

    @property
    def result(self) -> RankResult:
        """What the last training did to the ranks. Raises ValueError: none that moves ranks has ended yet."""
        if self._result is None:
            raise UserError("result is known when a training that moves ranks has ended; call trainer.train() first")
        return self._result

    def training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note where a training goes on from, and leave nothing of it in the model where an exception ends it."""
        name, folder = type(self.method).__name__, kwargs.get("resume_from_checkpoint")
        if self._over:
            raise UserError(f"{name} has ended, and its adapter is an ordinary LoRA; make a new model and Trainer")
        if folder is not None and not self.work.resumable:
            raise UserError(
                f"{name} of PEFT's AdaLoRA cannot go on from a checkpoint; begin anew, or from a LoraConfig"
            )
        self._resumes_from = None if folder is None else Path(folder)
        try:
            return original(*args, **kwargs)
        except BaseException:  # Ctrl-C in a notebook, say
            if self.allocator is not None:
                self.allocator.release()
            raise

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._wrapper = data_parallel(args, self.trainer.model_wrapped)
        self._writes = state.is_world_process_zero
        self.record_to = self.record_to if self._writes else None
        if self.work.ranks is not None:
            self._ranks_begin(self.work.ranks, args, state, kwargs["model"], kwargs["optimizer"])
        # Trainer multiplies such a loss by their number, since the gradient is averaged over them.
        processes = args.world_size if args.average_tokens_across_devices else 1
        divides = self.trainer.model_accepts_loss_kwargs
        self.work.begin(state.max_steps, args.gradient_accumulation_steps * processes if divides else 1)

    def _ranks_begin(self, method: ScoredMethod, args: Any, state: Any, model: Any, optimizer: Any) -> None:
        if self.allocator is not None:  # a second training may have loaded a checkpoint, which its optimizer follows
            self.allocator.release()
        # Trainer may have loaded a checkpoint of other ranks, and the state of a user's optimizer under the old ones.
        for layer, before in self._attached:
            pairs = zip(before, layer.factors, strict=True)
            rekey_state(unwrapped(optimizer), {old: new for old, new in pairs if old is not new})
        self._attached = []
        group = None if self._wrapper is None else self._wrapper.process_group
        self.allocator = RankAllocator(model, optimizer, method, state.max_steps, self.adapter, group)
        if args.torch_compile:
            self.allocator.expect_compilation()
        if self._resumes_from is not None and state.global_step > 0:
            check_loaded(self._resumes_from)
            try:
                restore(self.allocator, self._resumes_from)
            except SideFileError as problem:
                raise UserError(
                    f"{problem}, and ranks cannot go on without it; resume from a whole checkpoint, or begin a new "
                    f"training with the adapter of this one"
                ) from problem
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
        if record is None:
            return
        self._record(record)
        if self._wrapper is not None and (record["pruned"] or record["added"]):
            wrap_again(self._wrapper, init_sync=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.allocator is None or logs is None or "loss" not in logs:
            return  # an evaluation or the summary: nothing of ours has changed
        snapshot = self.allocator.snapshot(effective_ranks=self.record_to is not None)
        self._record(snapshot)
        if self._warns_of_ratio and (ratio := snapshot.get("orthogonality_ratio", 0.0)) > 1:
            self._warns_of_ratio = False
            logger.warning(
                "the gradient of Eq. (2) is %.1f times that of the task (the median so far), so A and B follow it and "
                "hardly learn; set orth_weight=0, as PeDyra() has it, or a smaller one",
                ratio,
            )
        ours = {"ranks/skipped_steps": self.allocator.run.skipped_steps, **_metrics(snapshot)}
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
            best = Path(state.best_model_checkpoint)
            if self.adapter != "default" and (best / self.adapter).is_dir():  # Trainer looks for "default" alone
                model.load_adapter(str(best / self.adapter), self.adapter, is_trainable=True)
            restore_factors(model, best, self.adapter)  # Trainer loads only the product E A, as PEFT saves it
        history, planned = allocator.history, allocator.schedule.adjustments
        self._result = RankResult(
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
        allocator.release()
        self._print(str(self._result))

    def _print(self, line: str) -> None:
        if self._writes:
            logger.info("%s", line)
            if not self.trainer.args.disable_tqdm:  # where Trainer prints its progress
                tqdm.write(f"pedyra: {line}")  # on a line of its own

    def first_batches(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's micro-batches of a step, and say of the first ones how much there is to learn from."""
        samples, items = original(*args, **kwargs)
        if self._counts_labels and samples and self.allocator is not None:
            self._counts_labels = False
            labels = [each["labels"] for each in samples if isinstance(each, Mapping) and "labels" in each]
            if labels and all(isinstance(each, Tensor) and each.ndim for each in labels):
                self._print_labels(labels, self.allocator.parameters)
        return samples, items

    def _print_labels(self, labels: list[Tensor], parameters: int) -> None:
        rows = sum(len(each) for each in labels)
        answers = sum(int((each != IGNORED).sum()) for each in labels)
        count = rows * self.trainer.args.world_size * self.trainer.state.max_steps
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "__len__"):
            count = min(count, len(dataset))  # type: ignore[arg-type]
        about = round(count * answers / rows)
        line = f"the adapter has {parameters:,} parameters, to learn from about {about:,} labels or answer tokens"
        if parameters > MANY * about:
            line += f"; with so many more parameters than labels it hardly matters where the ranks are: {WHERE}"
        self._print(line)

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

    def model_maker(self, model_init: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a Trainer's `model_init`, whose models take a checkpoint of any ranks."""

        def new_model(*args: Any) -> Any:
            model = model_init(*args)
            self.trainer.optimizer = None  # it was the model before's; Trainer makes it anew after this
            self.install(model)
            return model

        # As Trainer counts the arguments, which for a functools.partial is not what its signature says.
        return (lambda: new_model()) if number_of_arguments(model_init) == 0 else (lambda trial: new_model(trial))

    def create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the method's optimizer where Trainer would make its own."""
        trainer: Any = self.trainer
        if trainer.optimizer is None:
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            trainer.optimizer = self.work.make_optimizer(kind, arguments, trainer.args.weight_decay)
        return original(*args, **kwargs)

    def _start_record(self, allocator: RankAllocator, step: int) -> None:
        """Begin a new record, or go on with that of a resume: without the lines of steps that run again, and with the
        adjustments of the checkpoint that it lacks."""
        if self.record_to is None:
            return
        rows_before = read_rows(self.record_to, {"step": (int, None)}) if step > 0 else []
        earlier = [row for row in rows_before if (row.get("step") or 0) <= step]
        steps_on_file = {row["step"] for row in earlier if row.get("kind") == "adjustment"}
        missing = [record for record in allocator.history if record["step"] not in steps_on_file]
        rows = sorted([*(earlier or [allocator.describe()]), *missing], key=lambda row: row.get("step") or 0)
        write_file(self.record_to, "".join(map(json_line, rows)))
        if not earlier:
            self._record(allocator.snapshot())

    def _record(self, entry: dict[str, Any]) -> None:
        if self.record_to is not None:
            append_row(self.record_to, entry)


def _metrics(snapshot: dict[str, Any]) -> dict[str, float]:
    """Make flat numbers of a snapshot, for the log."""
    orthogonality = [value for pair in snapshot["orthogonality"].values() for value in pair]
    metrics: dict[str, float] = {
        "ranks/total": snapshot["total_rank"],
        "ranks/parameters": snapshot["parameters"],
        "orthogonality": sum(orthogonality) / len(orthogonality),
        **_means_by_type("ranks", snapshot["ranks"]),
    }
    if "orthogonality_ratio" in snapshot:
        metrics["orthogonality_ratio"] = snapshot["orthogonality_ratio"]
    if scores := snapshot["layer_scores"]:
        values = scores.values()
        metrics |= {"scores/mean": sum(values) / len(values), "scores/min": min(values), "scores/max": max(values)}
        metrics |= _means_by_type("scores", scores)
    return metrics


def _means_by_type(prefix: str, of_layers: Mapping[str, float]) -> dict[str, float]:
    """Average what layers have over those of each module type."""
    by_type: dict[str, list[float]] = {}
    for name, value in of_layers.items():
        by_type.setdefault(layer_place(name)[0], []).append(value)
    return {f"{prefix}/mean_{kind}": sum(values) / len(values) for kind, values in by_type.items()}


def _unscale(optimizer: Any) -> float:
    """Unscale the gradients of fp16, which stay scaled until clipping or the step: with no clipping we come first.
    Returns the scale, 1 without a scaler."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):  # clipping has unscaled them: what we want
            raise
    return scaler.get_scale()

"""All that a RankCallback changes in a Trainer, each with its reason, and what Trainer does not hand to its callbacks.

- `save_whole`: checkpoints appear whole or not at all, because a torn side file loses the run; one at the end of an
  epoch is written after the evaluation that is due there. It can be switched off: `RankCallback(...,
  whole_checkpoints=False)`.
- `end_at_last_step`: a training that is resumed at its last step takes none more. Trainer by itself takes one, with
  ranks that the schedule has no place for.
- `release_at_error`: an exception (Ctrl-C in a notebook) ends with the hooks taken off the model.
- `expect_mean_loss`: a model whose loss is a mean over its own rows is treated as one, so that PE-DyRA's penalty and
  scores weigh the same in 1, 2 and 4 processes and at any accumulation. It cannot be done by scaling the penalty alone,
  since Trainer clips the gradient of the multiplied loss before any callback sees it.
- `keep_whole`: under FSDP2 what is trained stays whole, so that ranks can move.
- `go_first`: the callback stands before the reporters, so that they get its numbers together with the loss.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate.utils import compare_versions
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy

from pedyra.allocate.checkpoint_folder import ASIDE, list_checkpoints
from pedyra.allocate.distributed import average_gradients
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.files import SUMS, remove, sync_folder, write_sums
from pedyra.lora.layer import AdaptedLayer

logger = logging.getLogger(__name__)


Caller = TypeVar("Caller")


def caller(kind: type[Caller]) -> Caller | None:
    """The nearest object of this kind whose method is running."""
    return next((frame.f_locals["self"] for frame in _frames_of(kind)), None)


def resumed_from() -> Path | None:
    """The checkpoint that the running `Trainer.train` has loaded; None if it loaded none."""
    given = (frame.f_locals.get("resume_from_checkpoint") for frame in _frames_of(Trainer))
    return next((Path(folder) for folder in given if isinstance(folder, (str, Path))), None)


def go_first(callback: TrainerCallback) -> None:
    """Move `callback` before Trainer's reporters, so that they get its numbers together with the loss.

    Second instances of the reporters would open runs of their own (TensorBoard, DVCLive), and Trainer hands a
    callback everything but the handler that is calling it. Moving an entry to the front while the handler iterates
    over the list neither skips nor repeats another one.
    """
    handler = caller(CallbackHandler)
    if handler is not None:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def release_at_error(trainer: Trainer) -> None:
    """Have the allocators of its callbacks released, and what they hold of a step, where an exception ends an epoch."""
    _put_around(trainer, "_run_epoch", _run_epoch, trainer)


def _run_epoch(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(*args, **kwargs)
    except BaseException:  # Ctrl-C in a notebook, say
        for callback in trainer.callback_handler.callbacks:
            if isinstance(made := getattr(callback, "allocator", None), RankAllocator):
                made.release()
            if isinstance(watch := getattr(callback, "first_forward", None), FirstForward):
                watch.remove()
        raise


def _frames_of(kind: type) -> Iterator[FrameType]:
    """The frames of methods of objects of this kind, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame
        frame = frame.f_back


def save_whole(trainer: Trainer) -> None:
    """Have `trainer` write its checkpoints aside and rename them, so that none is ever seen half-written.

    Trainer itself writes into `checkpoint-<step>` file by file, removes older checkpoints, and calls `on_save` only
    then. From here on it writes into a folder aside; callbacks that have a `write_side_files(folder)` add theirs; the
    digests of all files are put beside them; one rename makes it `checkpoint-<step>`; only then older ones go.
    At every instant the newest checkpoint that has been finished is there whole.

    Where the last step of an epoch is saved and the epoch evaluated, Trainer itself saves first. A resume would then
    lack that evaluation, and the random numbers that it took. From here on the evaluation comes first.
    """
    _put_around(trainer, "_save_checkpoint", _save, trainer)
    _put_around(trainer, "_maybe_log_save_evaluate", _save_after_evaluation, trainer)


_WAITED = "_saves_after_evaluation"
"""Attribute of a Trainer: the step whose checkpoint has waited for the end of its epoch."""


def _save_after_evaluation(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    control, state = trainer.control, trainer.state
    over = trainer.args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch or 0.5).is_integer()
    has_waited = vars(trainer).pop(_WAITED, None) == state.global_step
    waits = over and control.should_save and not control.should_evaluate and not has_waited
    if waits:
        vars(trainer)[_WAITED], control.should_save = state.global_step, False
    found = original(*args, **kwargs)
    if waits:
        control.should_save = True  # as the epoch ends, where Trainer evaluates before it saves
    return found


def _save(original: Callable[..., Any], trainer: Trainer, model: Any, trial: Any = None) -> None:
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    run = Path(trainer._get_output_dir(trial=trial))
    checkpoint, written = (folder / f"checkpoint-{state.global_step}" for folder in (run, run / ASIDE))
    if args.should_save:
        remove(run / ASIDE)  # a link, too, which would lead out of the run folder
    wait()  # for those who write there, too
    try:
        with replaced(trainer, "_get_output_dir", lambda trial: str(run / ASIDE)):
            with replaced(trainer, "_push_from_checkpoint", lambda folder: None):
                original(model, trial)
        renamed = state.best_model_checkpoint == str(written)
        if renamed:  # in every process: each of them may load it
            state.best_model_checkpoint = str(checkpoint)
        if args.should_save:
            _complete(trainer, written if written.is_dir() else checkpoint, renamed)
        wait()  # for the random numbers of every process
        # The first process of a node may have a disk of its own, with nothing but its node's random numbers.
        for finishes in (args.should_save, args.local_process_index == 0):
            if finishes and written.is_dir():
                write_sums(written, _files(written))
                sync_folder(written)
                _put(written, checkpoint)
            wait()
        if args.should_save:
            _drop_oldest(run, args.save_total_limit, checkpoint, state.best_model_checkpoint)
    finally:
        if args.should_save:
            shutil.rmtree(run / ASIDE, ignore_errors=True)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(checkpoint))


def end_at_last_step(trainer: Trainer) -> None:
    """Have a training that is resumed at its last step take none more; inside an epoch Trainer by itself takes one."""
    _put_around(trainer, "get_batch_samples", _batches, trainer)


def _batches(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    return ([], None) if trainer.state.global_step >= trainer.state.max_steps else original(*args, **kwargs)


def _complete(trainer: Trainer, written: Path, renamed: bool) -> None:
    """Add the side files, and Trainer's state anew, if its best checkpoint has got another name."""
    if renamed:
        trainer.state.save_to_json(str(written / "trainer_state.json"))
    for each in (trainer, *trainer.callback_handler.callbacks):
        if callable(write := getattr(each, "write_side_files", None)):
            write(written)


def _put(written: Path, checkpoint: Path) -> None:
    """Rename, in the place of a checkpoint of the same step, which stays to be found until the new one can be."""
    older = checkpoint.with_name(checkpoint.name.replace("-", "-0"))  # int("08") is a step, too
    if checkpoint.exists():
        _remove(older, written.parent)
        checkpoint.rename(older)
    written.rename(checkpoint)
    _remove(older, written.parent)


def _drop_oldest(run: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """By Trainer's rule: the oldest go, but neither the newest nor the best."""
    if limit is None or limit <= 0:
        return
    kept = {newest.resolve(), *([] if best is None else [Path(best).resolve()])}
    found = sorted(list_checkpoints(run), key=lambda folder: folder.stat().st_mtime)
    others = [folder for folder in found if folder.resolve() not in kept]
    for folder in others[: max(0, len(found) - max(limit, len(kept)))]:
        _remove(folder, run / ASIDE)


def _remove(folder: Path, aside: Path) -> None:
    """At once, as far as anyone can see: half a checkpoint must not be found either."""
    if folder.is_dir():
        aside.mkdir(exist_ok=True)
        remove(folder.rename(aside / f"{folder.name}.old"))


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name != SUMS]


@contextmanager
def replaced(trainer: Trainer, name: str, method: Any) -> Iterator[None]:
    before = trainer.__dict__.get(name)
    setattr(trainer, name, method)
    try:
        yield
    finally:
        delattr(trainer, name)
        if before is not None:
            setattr(trainer, name, before)


ITEMS = "num_items_in_batch"


class _Watched(Tensor):
    """A number that knows whether anything was computed from it."""

    used = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # of its device or shape, as checkpointing asks
            for each in args:
                if isinstance(each, cls):
                    each.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def expect_mean_loss(trainer: Trainer, model: nn.Module) -> FirstForward | None:
    """At the model's next forward with labels: have Trainer treat a loss that ignores `num_items_in_batch` as a mean.

    A step's gradient is then the mean over micro-batches and processes, whatever their number. A model that is
    compiled is left as it is, with a warning, and so is a Trainer that computes the loss itself, which knows what it
    divides by. Returns what to `remove` from the model when training ends.
    """
    if not trainer.model_accepts_loss_kwargs:
        return None
    if trainer.args.torch_compile:
        if trainer.args.gradient_accumulation_steps * trainer.args.world_size > 1:
            logger.warning(
                "the model is compiled, so it cannot be seen whether its loss is a mean of its own, which Trainer "
                "adds up over micro-batches and processes; if it is (a BERT classifier's is), set "
                "trainer.model_accepts_loss_kwargs = False before train()"
            )
        return None
    return FirstForward(trainer, model)


class FirstForward:
    """The hooks, until they have judged; those of a copy of the model, or of a pickle (for workers that load data), do
    nothing."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.trainer: Trainer | None = trainer
        self.hooks = [
            model.register_forward_pre_hook(self.watch, with_kwargs=True),
            model.register_forward_hook(self.judge, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"trainer": None, "hooks": []}

    def remove(self) -> None:
        """Take the hooks off the model. Where a Trainer computes the loss itself and gives the model no labels, they
        never judge, and would stay."""
        for hook in self.hooks:
            hook.remove()
        self.trainer, self.hooks = None, []

    def watch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        number = kwargs.get(ITEMS)
        if self.trainer is not None and isinstance(number, Tensor) and kwargs.get("labels") is not None:
            kwargs = {**kwargs, ITEMS: number.as_subclass(_Watched)}
        return args, kwargs

    def judge(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        number, trainer = kwargs.get(ITEMS), self.trainer
        if trainer is None or not isinstance(number, _Watched):
            return
        self.remove()
        if number.used:
            return
        trainer.model_accepts_loss_kwargs = False
        times = trainer.args.gradient_accumulation_steps * trainer.args.world_size
        if times > 1 and trainer.is_world_process_zero():
            logger.warning(
                "the model's loss does not depend on %s: it is a mean, and is averaged over micro-batches and "
                "processes. By itself Trainer would multiply it by up to %d",
                ITEMS,
                times,
            )


# FSDP2 averages the gradients of what it has cut, and Trainer then saves and loads the parts of every process. What is
# whole is averaged, saved and loaded here as under DDP.


def keep_whole(trainer: Trainer | None, model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Have a Trainer that will cut `model` by FSDP2 leave whole what is trained; nothing for any other Trainer.

    Every process begins with the trained parameters of the first. Gradients are averaged before they are clipped. A
    checkpoint is that of a training under DDP: it goes on in any number of processes, and without FSDP. Raises
    ValueError: a setting under which accelerate would cut them all the same, or ranks could not move.
    """
    plugin = None if trainer is None else getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer is None or plugin is None or plugin.fsdp_version != 2:
        return
    _check(trainer, plugin, model, layers)
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.a.to(trainer.args.device)  # where FSDP2 puts what it cuts; an E that is not trained is no Parameter
        whole += [p for slot in (layer.a, layer.b) for p in slot.parameters() if not p.requires_grad]
    for parameter in whole:
        parameter.data = parameter.data.to(trainer.args.device)
        torch.distributed.broadcast(parameter.data, 0)
    theirs = plugin.ignored_modules or []
    if isinstance(theirs, str):
        theirs = [module for name, module in model.named_modules() if re.fullmatch(theirs, name)]
    plugin.ignored_modules = [*theirs, nn.ParameterList(whole)]
    _put_around(trainer.accelerator, "prepare", _prepared, trainer)
    _put_around(trainer, "training_step", _averaged, trainer)
    for name in ("save_model", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_best_model"):
        _put_around(trainer, name, _without_fsdp, trainer)


def why_not_fsdp2(plugin: Any, args: TrainingArguments) -> str | None:
    """What these settings of accelerate and Trainer have that keeps `keep_whole` from its work, and the repair.

    It needs no model, so that it can be asked before one is loaded.
    """
    if plugin.cpu_ram_efficient_loading:
        return (
            "cpu_ram_efficient_loading, which cuts the adapter too; set it to false in fsdp_config, or in a launch "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if plugin.activation_checkpointing:
        return "activation_checkpointing in fsdp_config, whose names PEFT does not save; set gradient_checkpointing"
    if args.torch_compile:
        return "torch_compile; leave it out"
    if compare_versions("accelerate", "<", "1.11"):
        return "accelerate below 1.11, which cuts the adapter too; install a newer one"
    return None


def _check(trainer: Trainer, plugin: Any, model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    flaw = why_not_fsdp2(plugin, trainer.args) or _why_not_whole(trainer, model, layers)
    if flaw is not None:
        raise ValueError(f"pedyra does not train under Trainer's FSDP2 with {flaw}")


def _why_not_whole(trainer: Trainer, model: nn.Module, layers: Sequence[AdaptedLayer]) -> str | None:
    """What the model, or the way its processes share a batch, has that keeps `keep_whole` from its work."""
    mesh = getattr(trainer.accelerator, "parallelism_config", None)
    if mesh is not None and mesh.non_dp_dim_names:
        return f"{', '.join(mesh.non_dp_dim_names)} parallelism, whose processes share a batch; leave it out"
    adapted = [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if heads := [name for name in adapted if name in EMBEDDING_LAYER_NAMES]:
        return f"an adapter of {heads[0]}, whose weight PEFT would save; leave it out of target_modules"
    if any(layer.a.start is not None for layer in layers):
        return "a start that takes from the base weight, which is cut (PiSSA, OLoRA); use init_lora_weights=True"
    return None


def _put_around(owner: Any, name: str, around: Callable[..., Any], trainer: Trainer) -> None:
    """Have a method's calls go through `around(original, trainer, *args, **kwargs)`."""
    original = getattr(owner, name)
    if getattr(original, "func", None) is not around:  # a model_init, which is called again, has done so
        setattr(owner, name, functools.partial(around, original, trainer))


def _prepared(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """accelerate finds an optimizer's Parameters again by their address, and those of a rank 0 have none. All of them
    are whole, and so the same as before."""
    groups = [group for each in args if isinstance(each, Optimizer) for group in each.param_groups]
    held = [[*group["params"]] for group in groups]
    prepared = original(*args, **kwargs)
    for group, parameters in zip(groups, held, strict=True):
        group["params"][:] = parameters
    return prepared


def _averaged(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """At the last backward pass of a step, and so before clipping."""
    loss, model = original(*args, **kwargs), trainer.model
    if trainer.accelerator.sync_gradients and model is not None:
        average_gradients(model.parameters())
    return loss


def _without_fsdp(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """As under DDP: the adapter by PEFT, the optimizer's state by its first process."""
    if trainer.model is not None:
        reshard(trainer.model)
    with replaced(trainer, "is_fsdp_enabled", False):
        return original(*args, **kwargs)


def reshard(model: nn.Module) -> None:
    """Before the first process saves `model`: after an evaluation the state dict does this, and it would be alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""`pedyra.fit(trainer)`: how small may the adapter be that this Trainer has trained, by the loss that it trains?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

from transformers import Trainer

from pedyra.errors import UserError
from pedyra.export.destinations import Destination, destination
from pedyra.fitting.calibration import lora_layers
from pedyra.fitting.fit import PLAIN_BASE, Base, fit_batches
from pedyra.fitting.judge import Batch, DivergenceJudge
from pedyra.fitting.modes import disabled
from pedyra.fitting.request import FitRequest
from pedyra.fitting.result import Fit
from pedyra.lora.folder import active_adapter, saved_lora
from pedyra.lora.supported import check_supported
from pedyra.trainer.judge import TrainerJudge
from pedyra.trainer.probe import base_with_head, heads
from pedyra.trainer.rows import fit_rows, is_surrogate
from pedyra.trainer.untouched import untouched


def fit(
    trainer: Trainer,
    *,
    tolerance: str | None = None,
    changed: str | None = None,
    rank: int | None = None,
    rows: int | None = None,
    curve: bool = False,
    data: Any = None,
    for_: str | None = None,
) -> Fit:
    """Find how small the LoRA may be that this Trainer has trained; ask after `trainer.train()`.

    Gradients come from `trainer.compute_loss`, losses from its own evaluation, so the loss is the one that was trained:
    of DPO, KTO, a reward model, with class weights or label smoothing. Where that is a surrogate which says nothing
    about held-out rows (GRPO and RLOO, which are rewarded for what they write; DFT, whose weights are the probabilities
    themselves), it is judged by the divergence from what the whole adapter says instead. Nothing of Trainer, model or
    random state changes. One process, or several under DDP.

    Args:
        tolerance: what may be given up: "1%" of what fine-tuning won, or "0.5pt", half a point of the accuracy. By
            default "1pt" for a classifier with labels, and "1%" for others with labels.
        changed: or which share of the answers may be others than the whole adapter's, "2%": it needs no labels, and is
            the default for rows without.
        rank: take this rank in every layer, whatever it does, and say what it does.
        rows: how many held-out rows prove at most, and how many calibrate. By default 1,024 calibrate, and as many
            prove as one model answers in the time of the calibration.
        curve: measure the sizes below the first that is not within tolerance too.
        data: held-out rows, as the Trainer takes an eval_dataset; by default its own, else a part of those it was
            trained on, with a warning.
        for_: where the adapter will be served: "vllm", or another of `pedyra.export.destinations`. The ranks of this
            place are asked, and `save` writes the form that it reads; "vllm:16" takes that rank whatever it does.

    Returns:
        The fit: print it, `save` the smaller adapter, or `apply` it to the live model.

    Raises:
        UserError: no plain LoRA, a sharded model, too few rows, a layer that the calibration did not see; rows that
            cannot tell what is asked (a loss without labels, changed answers of a regression); the place is unknown or
            does not take this adapter, or none of its ranks is within tolerance.
    """
    request = FitRequest(tolerance=tolerance, changed=changed, rank=rank, rows=rows, curve=curve)
    place = None if for_ is None else destination(for_)
    return fit_trainer(trainer, request, place=place, data=data)


def fit_trainer(trainer: Trainer, request: FitRequest, *, place: Destination | None = None, data: Any = None) -> Fit:
    """Do what `fit` does, as this record asks, for this place."""
    if not isinstance(trainer, Trainer):
        raise UserError(f"fit takes the Trainer that has trained the model, and {type(trainer).__name__} is none")
    check_whole(trainer, "a fit")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapter = active_adapter(model)
    check_live(model, adapter)
    check_asked(request, place)
    if place is not None:
        with saved_lora(model, adapter) as lora:
            place.check(lora)
        request = replace(request, rank=place.rank)
    if (bias := model.peft_config[adapter].bias) != "none":
        warnings.warn(
            f"the adapter has bias={bias!r}, and PEFT keeps no biases of the base model, so the base model here has "
            f"the trained ones: what these won is not counted, and the tolerance is a part of the rest",
            stacklevel=3,
        )
    if isinstance(data, str):
        raise UserError(f"data is {data!r}; give the rows themselves, as the Trainer takes an eval_dataset")
    if trainer.args.fp16_full_eval or trainer.args.bf16_full_eval:  # the Trainer has left the model where it was
        trainer._move_model_to_device(model, trainer.args.device)
    with untouched(trainer, model):
        judge = of_loss = TrainerJudge(trainer, model)
        rows = fit_rows(trainer, data, request)
        if rows.unlabelled or is_surrogate(trainer):
            judge = DivergenceJudge(model, of_loss.answers)
            judge.loss_scale = of_loss.loss_scale
        shown = ("estimate" if trainer.args.disable_tqdm else "bar") if trainer.is_world_process_zero() else "nothing"
        base = base_of(trainer, model, rows.calibration, adapter)
        result = fit_batches(judge, rows, request, place=place, base=base, adapter=adapter, shown=shown)

    def again(**limits: Any) -> Fit:
        with untouched(trainer, model):
            return replace(next_size(**limits), trainer=ref(trainer), again=again)

    next_size: Any = result.again
    return replace(result, trainer=ref(trainer), again=again)


def check_asked(request: FitRequest, place: Destination | None) -> None:
    """Raise ValueError where both the destination and the request name ranks."""
    if place is not None and request.rank is not None:
        raise UserError(
            f"{place.name}, where it will be served, says the ranks, so leave out rank; {place.name}:16 takes one rank "
            f"whatever it does"
        )


def base_of(trainer: Any, model: Any, batches: Sequence[Batch], adapter: str) -> Base:
    """Return the model from which the adapter's gain is counted, as a context manager, and its name. For a classifier
    whose head was trained it is the base with a linear head that is fitted to these batches."""
    if batches and (probe := base_with_head(trainer, model, batches, adapter)) is not None:
        return probe, "the base model with a linear head fitted to it"
    inner = model.get_base_model()
    writes = hasattr(inner, "can_generate") and inner.can_generate()  # its head is the base's own
    untrained = ", whose head is untrained" if heads(model, adapter) and not writes else ""
    return partial(disabled, model), f"{PLAIN_BASE}{untrained}"


def check_whole(trainer: Any, what: str) -> None:
    """Raise ValueError for a model in shards, which `what` (a fit, a proof) cannot evaluate."""
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    parts = any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp"))
    engines = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    engines["tensor, context or sequence parallelism"] = parts
    if sharding := [name for name, on in engines.items() if on]:
        raise UserError(
            f"the model is sharded ({sharding[0]}), and {what} takes it whole; save the adapter and run `pedyra "
            f"{'fit FOLDER' if what == 'a fit' else 'prove A B'} --data ROWS` in one process"
        )


def check_live(model: Any, adapter: str) -> None:
    """Raise ValueError for a live adapter whose factors are not its update of the base: it is switched off, merged, or
    relative to a start (PiSSA)."""
    title = f"adapter {adapter!r}"
    for name, module in lora_layers(model, adapter).items():
        if module.disable_adapters:
            raise UserError(f"{title} is switched off in {name}; call model.base_model.enable_adapter_layers() first")
        if adapter in module.merged_adapters:
            raise UserError(f"{title} is merged into {name}; call model.unmerge_adapter() first")
        if getattr(module.lora_A[adapter], "origin", None) is not None:
            raise UserError(
                f"{title} began as a part of the weights (PiSSA, OLoRA), which the live model keeps beside it; call "
                f"pedyra.detach(model, {adapter!r}) first, after which its factors hold the difference"
            )
    check_supported("fit", title, model.peft_config[adapter].to_dict())

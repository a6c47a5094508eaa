"""Several processes share a training under an engine that ranks can move in: DDP, or FSDP2 with the adapter whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed
from accelerate.utils import compare_versions
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from pedyra.allocate.distributed import average_gradients
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.trainer.changes import attribute, put_around


def check_engine(trainer: Any) -> None:
    """Refuse an engine that would cut the adapter into pieces, before it is set up; ValueError."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(trainer, "is_deepspeed_enabled", False):
        engine = "DeepSpeed; train under DDP, without args.deepspeed: an adapter's own state is small;"
    elif getattr(trainer, "is_fsdp_enabled", False) and plugin is not None and plugin.fsdp_version == 1:
        engine = "FSDP1; use fsdp_config={'version': 2}, or DDP,"
    else:
        return
    cut = "or train plain LoRA there and cut it afterwards: pedyra fit FOLDER"
    raise UserError(f"pedyra.adapt does not support training under {engine} {cut}")


def data_parallel(args: TrainingArguments, wrapped: Any) -> DistributedDataParallel | None:
    """Find the wrapper that averages gradients, which must follow a resize; None for one process, and for FSDP2. Raises
    ValueError: another wrapper, in which a resize would diverge or crash."""
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # accelerate compiles what it has wrapped
    kind = type(wrapped).__name__
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped
    if isinstance(wrapped, FSDPModule):  # `keep_whole` has seen to it, and `check_unsharded` looks
        return None
    if args.fsdp or kind == "FullyShardedDataParallel":
        wrapper, repair = "Trainer's FSDP but for version 2 on an accelerator", "see docs/processes.md, or use DDP"
    elif args.world_size > 1:
        wrapper, repair = f"{args.world_size} processes in a {kind}", "use DDP, or one process"
    elif args.n_gpu > 1:
        wrapper, repair = f"DataParallel over {args.n_gpu} GPUs", "set CUDA_VISIBLE_DEVICES to one of them"
    else:
        return None
    raise UserError(f"pedyra.adapt does not support training under {wrapper}; {repair}")


def keep_whole(trainer: Trainer, model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Have a Trainer that will cut `model` by FSDP2 leave whole what is trained; nothing for any other Trainer.

    What is whole begins as in the first process, and is averaged, saved and loaded as under DDP; FSDP2 and Trainer do
    so for what is cut alone. Raises ValueError: accelerate would cut it all the same, or ranks could not move.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    if flaw := _why_not_whole(trainer, plugin, model, layers):
        raise UserError(f"pedyra does not train under Trainer's FSDP2 with {flaw}")
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.a.to(trainer.args.device)  # FSDP2 puts there what it cuts; an E that is not trained is no Parameter
        whole += [p for slot in (layer.a, layer.b) for p in slot.parameters() if not p.requires_grad]
    for parameter in whole:
        parameter.data = parameter.data.to(trainer.args.device)
        torch.distributed.broadcast(parameter.data, 0)
    theirs = plugin.ignored_modules or []
    if isinstance(theirs, str):
        theirs = [module for name, module in model.named_modules() if re.fullmatch(theirs, name)]
    plugin.ignored_modules = [*theirs, nn.ParameterList(whole)]
    put_around(trainer.accelerator, "prepare", _prepare, trainer)
    put_around(trainer, "training_step", _train_and_average, trainer)
    for name in ("save_model", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_best_model"):
        put_around(trainer, name, _without_fsdp, trainer)


def _why_not_whole(trainer: Trainer, plugin: Any, model: nn.Module, layers: Sequence[AdaptedLayer]) -> str | None:
    """Tell what keeps `keep_whole` from its work, and the repair."""
    if plugin.cpu_ram_efficient_loading:
        return (
            "cpu_ram_efficient_loading, which cuts the adapter too; set it to false in fsdp_config, or in a launch "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if plugin.activation_checkpointing:
        return "activation_checkpointing in fsdp_config, whose names PEFT does not save; set gradient_checkpointing"
    if trainer.args.torch_compile:
        return "torch_compile; leave it out"
    if compare_versions("accelerate", "<", "1.11"):
        return "accelerate below 1.11, which cuts the adapter too; install a newer one"
    mesh = getattr(trainer.accelerator, "parallelism_config", None)
    if mesh is not None and mesh.non_dp_dim_names:
        return f"{', '.join(mesh.non_dp_dim_names)} parallelism, whose processes share a batch; leave it out"
    adapted = [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if heads := [name for name in adapted if name in EMBEDDING_LAYER_NAMES]:
        return f"an adapter of {heads[0]}, whose weight PEFT would save; leave it out of target_modules"
    if any(layer.a.start is not None for layer in layers):
        return "a start that takes from the base weight, which is cut (PiSSA, OLoRA); use init_lora_weights=True"
    return None


def _prepare(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Keep an optimizer's Parameters: accelerate looks for them by their address, and those of a rank 0 have none."""
    groups = [group for each in args if isinstance(each, Optimizer) for group in each.param_groups]
    lists = [[*group["params"]] for group in groups]
    result = original(*args, **kwargs)
    for group, parameters in zip(groups, lists, strict=True):
        group["params"][:] = parameters
    return result


def _train_and_average(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Average at the last backward pass of a step, and so before clipping."""
    loss, model = original(*args, **kwargs), trainer.model
    if trainer.accelerator.sync_gradients and model is not None:
        average_gradients(model.parameters())
    return loss


def _without_fsdp(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Save and load as under DDP: the adapter by PEFT, the optimizer's state by its first process."""
    if trainer.model is not None:
        reshard(trainer.model)
    with attribute(trainer, "is_fsdp_enabled", False):
        return original(*args, **kwargs)


def reshard(model: nn.Module) -> None:
    """Cut `model` again before its first process saves it, in whose state dict it would do so alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

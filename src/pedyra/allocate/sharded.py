"""Trainer's FSDP2: the base is cut over the processes, and what is trained stays whole, so that ranks can move.

FSDP2 averages the gradients of what it has cut, and Trainer then saves and loads the parts of every process. What is
whole is averaged, saved and loaded here as under DDP.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import Trainer

from pedyra.allocate.checkpoint_folder import replaced
from pedyra.allocate.distributed import average_gradients
from pedyra.lora.layer import AdaptedLayer


def keep_whole(trainer: Trainer | None, model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Have a Trainer that will cut `model` by FSDP2 leave whole what is trained; nothing for any other Trainer.

    Every process begins with the trained parameters of the first. Gradients are averaged before they are clipped. A
    checkpoint is that of a training under DDP: it goes on in any number of processes, and without FSDP.

    Raises:
        ValueError: a setting under which accelerate would cut them all the same, or ranks could not move.
    """
    plugin = None if trainer is None else getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer is None or plugin is None or plugin.fsdp_version != 2:
        return
    _check(trainer, plugin, layers)
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


def _check(trainer: Trainer, plugin: Any, layers: Sequence[AdaptedLayer]) -> None:
    flaw, mesh = None, getattr(trainer.accelerator, "parallelism_config", None)
    if plugin.cpu_ram_efficient_loading:
        flaw = "cpu_ram_efficient_loading, which cuts the adapter too; set it to false in fsdp_config"
    elif plugin.activation_checkpointing:
        flaw = "activation_checkpointing in fsdp_config, whose names PEFT does not save; set that of TrainingArguments"
    elif trainer.args.torch_compile:
        flaw = "torch_compile; leave it out"
    elif mesh is not None and mesh.non_dp_dim_names:
        flaw = f"{', '.join(mesh.non_dp_dim_names)} parallelism, whose processes share a batch; leave it out"
    elif heads := [layer.name for layer in layers if layer.name.split(".")[-1] in EMBEDDING_LAYER_NAMES]:
        flaw = f"an adapter of {heads[0]}, whose weight PEFT would save; leave it out of target_modules"
    elif any(layer.a.start is not None for layer in layers):
        flaw = "a start that takes from the base weight, which is cut (PiSSA, OLoRA); use init_lora_weights=True"
    if flaw is not None:
        raise ValueError(f"RankCallback does not support Trainer's FSDP2 with {flaw}")


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
    for module in [] if trainer.model is None else trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the state dict of the first process does; after an evaluation it would be alone with it
    with replaced(trainer, "is_fsdp_enabled", False):
        return original(*args, **kwargs)

"""Data parallelism: what processes measured on their parts of a batch is averaged, so that all decide the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pedyra.errors import UserError


class Average:
    """The mean of a tensor over the processes of a group of torch.distributed (None: all that there are), the same on
    each; all of them call it, in the same order."""

    def __init__(self, group: Any = None) -> None:
        runs = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.processes, self.group = torch.distributed.get_world_size(group) if runs else 1, group

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.processes == 1:
            return tensor
        total = tensor.clone()  # a sum and a division: gloo has no mean
        torch.distributed.all_reduce(total, group=self.group)
        return total / self.processes


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: Any = None) -> None:
    """Average the gradients over the processes of a group, in one collective: for a model that no wrapper averages.

    Call it after the backward passes of a step and before clipping. A gradient that no process has stays None; one that
    some lack counts as zero there. Nothing to do in one process.
    """
    average = Average(group)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if average.processes == 1 or not trainable:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    present = torch.tensor([p.grad is not None for p in trainable]).to(flat)
    flat, present = average(torch.cat([flat, present])).split([len(flat), len(present)])
    parts = flat.split([gradient.numel() for gradient in gradients])
    for parameter, part, somewhere in zip(trainable, parts, present.tolist(), strict=True):
        if somewhere:
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def check_same(triples: Sequence[Tensor], group: Any, step: int) -> None:
    """Raise ValueError, in every process, where processes of a group have other numbers in their triples: they do not
    average their gradients, and nothing else would say so. Sums of all bits are compared, in one collective."""
    if Average(group).processes == 1:
        return
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack([triple.detach().view(bits[triple.element_size()]).sum(dtype=torch.int64) for triple in triples])
    largest = torch.cat([sums, -sums])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    most, least = largest.chunk(2)
    if not torch.equal(most, -least):
        raise UserError(
            f"processes differ in their triples after step {step}: gradients are not averaged. Wrap the model in "
            f"DistributedDataParallel once RankAllocator is made, and after each record in which triples moved, or "
            f"call average_gradients; process_group= has the processes of one model, on like devices"
        )


def wrap_again(wrapper: DistributedDataParallel, *, init_sync: bool = True) -> None:
    """Have a wrapper average the gradients of the parameters that its module has now, with the same settings and hooks.

    New parameters would train on each process by itself, without an error, so its constructor runs once more on the
    same object, which training loops hold on to. `init_sync`: the first process sends its whole model, the frozen base
    too, which is of no use after a move.
    """
    # torch 2.13 has renamed the setting, and warns of the old name.
    buffers = "forward_sync_buffers" if hasattr(wrapper, "forward_sync_buffers") else "broadcast_buffers"
    settings = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", buffers)
    settings += ("gradient_as_bucket_view", "static_graph")
    values = {name: getattr(wrapper, name) for name in settings}
    if not getattr(wrapper, "bucket_bytes_cap_default", True):
        values["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 1024**2
    hooks: list[tuple[Any, Any]] = list(getattr(wrapper, "_comm_hooks", ()))
    training = wrapper.training
    wrapper.__init__(wrapper.module, init_sync=init_sync, **values)
    wrapper.training = training
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)

"""A method runs in a hand-written training loop here, without a Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from pedyra.allocate.contract import Work
from pedyra.allocate.rank_allocator import RankAllocator


def make_optimizer(
    model: nn.Module, work: Work, kind: type[Optimizer] = AdamW, *, weight_decay: float = 0.0, **arguments: Any
) -> Optimizer:
    """Make the optimizer of a method: `kind` over all that is trained, in the groups that the method asks for.

    Args:
        arguments: of `kind`, lr among them.
    """
    own = work.make_optimizer(kind, arguments, weight_decay)
    if own is not None:
        return own
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind([{"params": trained, "weight_decay": weight_decay}], **arguments)


class Loop:
    """A hand-written loop calls this around each step, so that a method gets what it needs:

        loop = Loop(model, work, optimizer, total_steps)
        for batch in batches:
            loop.begin_step()
            loss(model, batch).backward()  # clip the gradients after it, if they are
            loop.step()                    # in the place of optimizer.step() and zero_grad()
            scheduler.step()
        loop.finish()

    Args:
        work: of `Method.install`.
        optimizer: of `make_optimizer`.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: what RankAllocator refuses.
    """

    def __init__(self, model: nn.Module, work: Work, optimizer: Optimizer, total_steps: int) -> None:
        self.work, self.optimizer = work, optimizer
        self.allocator: RankAllocator | None = None
        if work.ranks is not None:
            self.allocator = RankAllocator(model, optimizer, work.ranks, total_steps)
        self.taken = 0
        """Steps taken so far."""
        work.begin(total_steps, 1)

    def begin_step(self) -> None:
        """Begin a step, before its first forward pass."""
        self.work.step_begins(self.taken)

    def step(self) -> dict[str, Any] | None:
        """Take the optimizer's step, clear the gradients, and adjust the ranks where it is time.

        Returns the record of an adjustment (`RankAllocator.after_step`), or None.
        """
        self.update()
        return self.adjust()

    def update(self) -> None:
        """Do the first half of `step`: all but the adjustment."""
        if self.allocator is not None:
            self.allocator.before_step()
        self.optimizer.step()
        self.work.stepped(self.taken)
        self.optimizer.zero_grad()
        self.taken += 1

    def adjust(self) -> dict[str, Any] | None:
        """Do the second half."""
        return None if self.allocator is None else self.allocator.after_step()

    def finish(self) -> None:
        """End training, or break it off: what is saved now is what PEFT loads."""
        if self.allocator is not None:
            self.allocator.release()
        self.work.end()

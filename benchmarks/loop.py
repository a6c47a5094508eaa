"""A method runs in a hand-written training loop here, without a Trainer."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW, Optimizer

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.methods.method import Adaptation, Running


def make_optimizer(
    adaptation: Adaptation, kind: type[Optimizer] = AdamW, *, weight_decay: float = 0.0, **arguments: Any
) -> Optimizer:
    """Make the optimizer of a method: `kind` over all that is trained, in the groups that the method asks for.

    Args:
        arguments: of `kind`, lr among them.
    """
    if adaptation.optimizer is not None:
        return adaptation.optimizer(kind, arguments, weight_decay)
    trained = [parameter for parameter in adaptation.model.parameters() if parameter.requires_grad]
    return kind([{"params": trained, "weight_decay": weight_decay}], **arguments)


class Loop:
    """A hand-written loop calls this around each step, so that a method gets what it needs:

        loop = Loop(adaptation, optimizer, total_steps)
        for batch in batches:
            loop.begin_step()
            loss(model, batch).backward()  # clip the gradients after it, if they are
            loop.step()                    # in the place of optimizer.step() and zero_grad()
            scheduler.step()
        loop.finish()

    Args:
        adaptation: what the method made of the model.
        optimizer: of `make_optimizer`.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: what RankAllocator refuses.
    """

    def __init__(self, adaptation: Adaptation, optimizer: Optimizer, total_steps: int) -> None:
        self.adaptation, self.optimizer = adaptation, optimizer
        self.allocator: RankAllocator | None = None
        if adaptation.ranks is not None:
            self.allocator = RankAllocator(adaptation.model, optimizer, adaptation.ranks, total_steps)
        self.taken = 0
        """Steps taken so far."""
        adaptation.hooks.begin(Running(total_steps=total_steps, allocator=self.allocator))

    def begin_step(self) -> None:
        """Begin a step, before its first forward pass."""
        self.adaptation.hooks.step_begins(self.taken)

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
        self.adaptation.hooks.stepped(self.taken)
        self.optimizer.zero_grad()
        self.taken += 1

    def adjust(self) -> dict[str, Any] | None:
        """Do the second half."""
        return None if self.allocator is None else self.allocator.after_step()

    def finish(self) -> None:
        """End training, or break it off: what is saved now is what PEFT loads."""
        self.adaptation.hooks.end()
        if self.allocator is not None:
            self.allocator.release()
        if self.adaptation.finish is not None:
            self.adaptation.finish()

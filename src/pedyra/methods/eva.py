"""EVA (Paischer et al. 2024) is PEFT's: here it gets the training's own batches, and is an ordinary LoRA afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn

from pedyra.allocate.contract import BatchLoss, Method, Training, Work
from pedyra.allocate.schedule import check_number
from pedyra.errors import UserError
from pedyra.methods.slots import refuse_lora

MOST = 1000
"""Batches: where no order of the directions has settled after these, none will."""
IGNORED = -100
"""A label that no loss counts."""


@dataclass(frozen=True, kw_only=True)
class Eva(Method):
    """EVA (Paischer et al. 2024): ranks and A from the directions in which the inputs vary, before the first step.

    PEFT's `initialize_lora_eva_weights` sees batches of the training until the singular vectors of each layer's inputs
    hold still (cosine 0.99). The directions that explain most of their layer's variance get the LoRA's ranks, and are
    the rows of A; B = 0, and every layer keeps the scaling alpha / r. A layer without any has no adapter. It takes
    place again on a resume. Departs from the paper in nothing: padding and tokens without a label are left out, as
    PEFT does. Raises ValueError: another start; a layer whose inputs are fewer in a batch than its ranks may be.
    """

    rho: float = 2.0
    """A layer has at most `rho` times the LoRA's r; at 1 ranks stay as they are, and only A is chosen."""

    in_processes = False

    def __post_init__(self) -> None:
        check_number("rho", self.rho, least=1)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "EVA", ("init_lora_weights",))
        if training is None:
            raise UserError("EVA chooses ranks by the rows of a training, and has none; use pedyra.adapt")
        of: Any = model
        # The config will carry this run's ranks, so it is a copy: the user may reuse the object.
        config = of.peft_config[adapter] = copy.deepcopy(of.peft_config[adapter])
        config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=self.rho)
        tokens = Tokens(round(self.rho * max([config.r, *config.rank_pattern.values()])))
        watch = model.register_forward_pre_hook(tokens.note, with_kwargs=True)
        try:
            with torch.random.fork_rng(devices=[]):
                initialize_lora_eva_weights(
                    of,
                    Batches(training),
                    forward_fn=lambda model, batch: batch.loss(model),
                    prepare_model_inputs_fn=lambda batch, config: None,
                    prepare_layer_inputs_fn=tokens.of_layer,
                    adapter_name=adapter,
                    show_progress_bar=False,
                )
        finally:
            watch.remove()
            config.init_lora_weights, config.eva_config = True, None  # what is saved is loaded as any LoRA
        return Work()


class Tokens:
    """EVA looks at the tokens of a forward pass that are real and have a label, as far as that is known."""

    def __init__(self, least: int) -> None:
        self.least = least
        """A layer must see so many in a batch: as many as it may have ranks."""
        self.mask: Tensor | None = None

    def note(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note which tokens count, `(rows, tokens)`, before a forward pass; a label for each row is for none."""
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        self.mask = None if mask is None or mask.ndim != 2 else mask.bool()
        if isinstance(labels, Tensor) and labels.ndim == 2 and (mask is None or labels.shape == mask.shape):
            self.mask = (labels != IGNORED) if self.mask is None else self.mask & (labels != IGNORED)

    def of_layer(self, inputs: tuple[Tensor, ...], batch: None, name: str) -> Tensor:
        """Return the inputs `(n, in)` of a layer that count; all, where it sees something else than these tokens."""
        x = inputs[0]
        real = self.mask is not None and x.shape[:-1] == self.mask.shape
        rows = (x[self.mask] if real else x.reshape(-1, x.shape[-1])).contiguous()
        if len(rows) < self.least:
            raise UserError(
                f"{name} sees {len(rows)} inputs in a batch, and EVA looks for {self.least} directions in them; raise "
                f"per_device_train_batch_size, lower r, or leave the layer out (exclude_modules)"
            )
        return rows


@dataclass(frozen=True)
class Batch:
    """PEFT moves a batch to a device, where the training's loss puts it by itself."""

    loss: BatchLoss

    def to(self, device: Any) -> Batch:
        return self


@dataclass(frozen=True)
class Batches:
    """PEFT asks its loader for batches until the directions hold still, and whether there is any."""

    training: Training

    def __len__(self) -> int:
        return MOST

    def __iter__(self) -> Iterator[Batch]:
        for _, loss in zip(range(MOST), self.training.batches(), strict=False):
            yield Batch(loss)
        raise UserError(f"EVA's directions do not hold still in {MOST} batches; raise per_device_train_batch_size")

"""What the mean loss of a batch is a mean over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def num_samples(model: nn.Module, batch: Mapping[str, Any], output: Any = None) -> Tensor:
    """What the mean loss of a batch is a mean over, `()`: tokens or rows with a label, else tokens with logits, else
    rows. Nothing waits for the device.

    Args:
        output: what the model gave for it, where that is known.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        first = int(labels.dim() > 1 and shifts(model))
        return (labels[..., first:] != -100).sum().float()
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and not isinstance(labels, Tensor):
        return torch.tensor(float(logits.shape[:-1].numel()), device=logits.device)
    every = (each for part in (output, batch) for each in tensors_of(part) if each.dim() > 0)
    rows = next(every, torch.zeros(1))
    return torch.tensor(float(len(rows)), device=rows.device)


def tensors_of(part: Any) -> Iterator[Tensor]:
    """All tensors of a batch, or of what a model gives."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping | tuple | list):
        for each in part.values() if isinstance(part, Mapping) else part:
            yield from tensors_of(each)
    else:
        yield from (each for each in getattr(part, "__dict__", {}).values() if isinstance(each, Tensor))


def shifts(model: Any) -> bool:
    """Whether labels are the tokens themselves, each predicted from those before it, so that none predicts the first.

    So it is of models that write, but for those whose decoder is given the labels one place later.
    """
    writes = hasattr(model, "can_generate") and model.can_generate()
    return writes and not getattr(model.config, "is_encoder_decoder", False)

"""Rows that a tiny classifier learns in a few seconds, and how it is judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(count: int, seed: int) -> Any:
    """Rows of eight tokens each, as a list. The first token is a low one or a high one, which is the class, but for one
    row in twenty."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(3, 40, (8,), generator=draw)
        label = int(torch.randint(2, (1,), generator=draw))
        tokens[0] = 5 + 25 * label + int(torch.randint(5, (1,), generator=draw))
        label ^= int(torch.rand(1, generator=draw) < 0.05)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label})
    return found


def accuracy(prediction: Any) -> dict[str, float]:
    """compute_metrics of a Trainer."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def logits(model: Any, batch: list[dict[str, Any]]) -> Tensor:
    """Of a model in evaluation mode."""
    inputs = {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(**inputs).logits

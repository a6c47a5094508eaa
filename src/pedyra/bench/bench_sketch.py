"""`pedyra bench sketch`: gradient sketches against the dense gradient's own singular pairs.

The dense gradient is formed here, for the base weights take part in these backward passes; training never does that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer

from pedyra.allocate.schedule import LEAST_STEPS
from pedyra.bench.bench_models import BenchModel, bench_model
from pedyra.bench.sketch_carriers import compare_carriers
from pedyra.lora.attach import AdaptedLayer, attach
from pedyra.methods.pedyra.gradient_sketch import GradientSketch
from pedyra.models.packaged import minilm_folder
from pedyra.tasks.reviews import reviews

COLUMNS = {
    "batches": "batches", "steps": "steps", "size": "size", "angle": "angle", "angle_worst": "worst",
    "captured": "captured", "captured_worst": "worst", "sigma_error": "sigma", "sigma_error_worst": "worst",
    "held_out": "held_out",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
PAIRS = 2
"""Singular pairs that are compared."""
_WARMUP = 20
"""Optimizer steps first, so that the gradients are those of a model in training, not of a random head."""

Batch = dict[str, Tensor]


def bench_sketch(
    name: str = "minilm",
    *,
    sizes: Sequence[int] = (2, 4, 8, 16),
    windows: Sequence[int] = (6, 21),
    same: int = 8,
    held_out: int = 32,
    rounds: int = 7,
    batch: int | None = None,
    length: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of kind "accuracy", then of kind "carrier" (see `compare_carriers`).

    Of the first, one per window and sketch size: medians and worst values over the layers, `layers` having each one's.

    `batches` is "same" where every part of the window sees the same `same` micro-batches (the sketch's own error) and
    "own" where each of `steps` steps has its own (noise as well); the dense gradient is the mean over all of them.
    `angle` is the largest angle, in degrees, between the spans of the first `PAIRS` pairs, of the worse side;
    `captured` what the sketch's pairs gain along the dense gradient, u^T G v, by what its own would; `sigma_error`
    the largest relative error of the estimated gains against its singular values. `held_out` is what the sketch's
    pairs gain along the gradient of `held_out` other micro-batches, all layers together, by what the dense one's do:
    much of the dense gradient of a short window is noise, and there its own pairs are no better than others.

    Raises:
        ValueError: an unknown model, or a window of fewer than four steps.
    """
    if short := [steps for steps in windows if steps < LEAST_STEPS]:
        raise ValueError(
            f"window {short[0]} is too short: a sketch has three parts, so a window has at least {LEAST_STEPS} steps"
        )
    model, layers, source = prepare(bench_model(name).with_batch(batch, length))
    micro_batches = [source(number) for number in range(max([same, *windows]))]
    others = dense_gradients(model, layers, [[source(1000 + number)] for number in range(held_out)])
    cases = [("same", [micro_batches[:same]] * LEAST_STEPS)]
    cases += [("own", [[each] for each in micro_batches[:steps]]) for steps in windows]
    for kind, steps in cases:
        dense = [torch.linalg.svd(each, full_matrices=False) for each in dense_gradients(model, layers, steps)]
        for size in sizes:
            sketch = sketch_of(model, layers, steps, size)
            found = {
                layer.name: _compare(sketch, layer, pairs, other)
                for layer, pairs, other in zip(layers, dense, others, strict=True)
            }
            row: dict[str, Any] = {
                "kind": "accuracy",
                "model": name,
                "batches": kind,
                "steps": len(steps),
                "size": size,
            }
            for column, worst in (("angle", max), ("captured", min), ("sigma_error", max)):
                values = [each[column] for each in found.values()]
                row |= {column: median(values), f"{column}_worst": worst(values)}
            ours, dense_gain = (sum(each[side] for each in found.values()) for side in ("held_out", "dense_held_out"))
            yield row | {"held_out": ours / dense_gain, "layers": found}
    yield from compare_carriers(model, layers, source(0), sizes=sizes, rounds=rounds)


def prepare(bench: BenchModel, rank: int = 8) -> tuple[Any, list[AdaptedLayer], Any]:
    """The model with a LoRA on all its linears, a few steps trained, and a source of batches by number."""
    config = LoraConfig(task_type=bench.task_type, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                        exclude_modules=bench.exclude)  # fmt: skip
    model: Any = get_peft_model(bench.build(), config).train()  # type: ignore[arg-type]
    for module in model.modules():  # the gradient of a batch must be the same each time it is taken
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layers = attach(model)
    source = _reviews(bench) if bench.name == "minilm" else bench.example
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(_WARMUP):
        model(**source(10_000 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, layers, source


def dense_gradients(model: Any, layers: Sequence[AdaptedLayer], steps: Iterable[Iterable[Batch]]) -> list[Tensor]:
    """dL/dW `(out, in)` of every base weight: summed over the micro-batches of a step, the mean over steps."""
    weights = [layer.module.get_base_layer().weight.requires_grad_() for layer in layers]
    count = 0
    for step in steps:
        for batch in step:
            model(**batch).loss.backward()
        count += 1
    gradients = [weight.grad / count for weight in weights]
    model.zero_grad()
    for weight in weights:
        weight.requires_grad_(False)
    return gradients


def sketch_of(
    model: Any, layers: Sequence[AdaptedLayer], steps: Sequence[Iterable[Batch]], size: int
) -> GradientSketch:
    """A finished sketch of the gradients of these steps, its probes taken out again."""
    sketch = GradientSketch(layers, q=size, steps=len(steps), generator=torch.Generator().manual_seed(0))
    for step in steps:
        for batch in step:
            model(**batch).loss.backward()
        sketch.observe()
    sketch.remove()
    model.zero_grad()
    return sketch


def _compare(
    sketch: GradientSketch, layer: AdaptedLayer, dense: tuple[Tensor, Tensor, Tensor], other: Tensor
) -> dict[str, float]:
    """One layer's figures against its dense gradient's (U, S, Vh), and against the gradient of `other` batches."""
    U, S, Vh = dense
    index = next(i for i, known in enumerate(sketch.layers) if known.name == layer.name)
    gains, best = sketch.gains()[index][0].sort(descending=True)  # by slope, as singular values are
    gains, best = gains[:PAIRS], best[:PAIRS]
    u, v = sketch.left[index].T[best], sketch.right[index][best]  # (k, out), (k, in)
    k = len(u)
    return {
        "angle": max(largest_angle(U.T[:k], u), largest_angle(Vh[:k], v)),
        "captured": _gain(u, (U * S) @ Vh, v) / float(S[:k].sum()),
        "sigma_error": float(((gains - S[:k]).abs() / S[:k]).max()),
        "held_out": _gain(u, other, v),
        "dense_held_out": _gain(U.T[:k], other, Vh[:k]),
        "dense_sigma": float(S[:k].sum()),
    }


def _gain(u: Tensor, gradient: Tensor, v: Tensor) -> float:
    """The sum of u_i^T G v_i over pairs given as rows."""
    return float(((u @ gradient) * v).sum())


def largest_angle(rows: Tensor, others: Tensor) -> float:
    """The largest principal angle, in degrees, between the spans of two sets of rows `(k, n)`, each independent."""
    one, two = (torch.linalg.qr(each.double().T).Q for each in (rows, others))
    sine = torch.linalg.matrix_norm(one - two @ (two.T @ one), 2)
    return math.degrees(math.asin(min(1.0, float(sine))))


def _reviews(bench: BenchModel) -> Any:
    """Batch `number` of the reviews, tokenised for MiniLM; the rows are shuffled once."""
    tokenizer, rows = AutoTokenizer.from_pretrained(minilm_folder()), reviews()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()

    def source(number: int) -> Batch:
        chosen = [rows[order[(number * bench.batch + i) % len(rows)]] for i in range(bench.batch)]
        texts = [row["text"] for row in chosen]
        tokens = tokenizer(texts, truncation=True, max_length=bench.length, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([row["label"] for row in chosen])}

    return source

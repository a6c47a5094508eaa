"""`pedyra bench cuts`: what a trained LoRA loses when it is cut to one size in different ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pedyra.app.runs.evaluate import finished_run
from pedyra.fitting.calibration import calibrate, lora_layers, truncated
from pedyra.fitting.curve import Ladder, Shape
from pedyra.fitting.cut import singular_basis
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.verdict import paired
from pedyra.fitting.worth import Balance, balance
from pedyra.lab.bench.trained import TrainedLora

SHARES = (0.5, 0.25, 0.125)


def bench_cuts(
    runs: Sequence[Path], shares: Sequence[float] = SHARES, rows: int = 1024, random_seeds: int = 3
) -> Iterator[dict[str, Any]]:
    """One row for each run, way and size: the rise of the held-out loss, in pairs with the whole adapter.

    Ways: `fit`, as `pedyra fit` orders and cuts; `singular values`, of s B A, by their squares per parameter; `energy`,
    the same values, each layer keeping an equal part of its own squares, which is the rule of `peft.convert_to_lora`;
    `inputs`, which knows the inputs of a layer and not its gradients; `first`, the first ranks of A and B as they are
    stored, as many in every layer, which is what method graded trains for; `random` directions.

    Args:
        shares: parts of the parameters that are left.
        rows: of training, to calibrate with, at most; 1.5 times as many of those held out are measured on.

    Raises:
        ValueError: one of `runs` is no finished run, or a share is no part; told before anything is measured.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--share is {share}; it is the part that is left, above 0 and at most 1")
    for run in runs:
        finished_run(run)
    for run in runs:
        yield from _cuts(run, shares, rows, random_seeds)


def _cuts(run: Path, shares: Sequence[float], rows: int, random_seeds: int) -> Iterator[dict[str, Any]]:
    trained = TrainedLora(run, rows, held_out=rows + rows // 2)
    model, weights = trained.model, trained.weights
    measured = calibrate(trained.judge, trained.training)
    whole = trained.losses()
    loss = paired([0.0] * len(whole), whole, weights).mean
    for way, seed, calibration in ways(model, measured, random_seeds):
        ladder = Ladder(calibration, Shape())
        for share in shares:
            size = ladder.point(ladder.at(share))
            cut = partial(truncated, model, calibration, size.ranks)
            increase = paired(whole, trained.losses(cut), weights)
            yield {
                "run": str(run), "way": way, "seed": seed, "share": size.share, "parameters": size.parameters,
                "loss": loss, "increase": increase.mean, "standard_error": increase.error,
            }  # fmt: skip


def ways(model: Any, measured: Calibration, random_seeds: int) -> Iterator[tuple[str, int | None, Calibration]]:
    """Name, seed, and bases with values by which the directions are ordered."""
    yield "fit", None, measured
    singular, energy, inputs, first = {}, {}, {}, {}
    for name, module in lora_layers(model).items():
        A, B = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        layer, scaling = measured.layers[name], module.scaling["default"]
        basis = singular_basis(A, scaling * B)
        singular[name] = _ordered(layer, basis, basis.values)
        squares = basis.values.square()
        left = squares.flip(0).cumsum(0).flip(0) / squares.sum()  # what goes, where this and all after it go
        energy[name] = _ordered(layer, basis, (left * layer.parameters).sqrt())
        of_inputs = layer.basis.inverse * layer.basis.values @ layer.basis.inverse.T  # E[h h^T]
        basis = balance(of_inputs, (scaling * B.double()).T @ (scaling * B.double()))
        inputs[name] = _ordered(layer, basis, basis.values)
        identity, last = torch.eye(layer.rank).double(), torch.arange(layer.rank, 0, -1).double()
        first[name] = _ordered(layer, Balance(identity, identity, last), (last * layer.parameters).sqrt())
    yield "singular values", None, replace(measured, layers=singular)
    yield "energy", None, replace(measured, layers=energy)
    yield "inputs", None, replace(measured, layers=inputs)
    yield "first", None, replace(measured, layers=first)
    for seed in range(random_seeds):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, layer in singular.items():
            order = torch.randperm(layer.rank, generator=generator)
            basis = Balance(layer.basis.T[order], layer.basis.inverse[:, order], layer.basis.values)
            values = torch.rand(layer.rank, generator=generator).double().sort(descending=True).values
            layers[name] = _ordered(layer, basis, (values * layer.parameters).sqrt())
        yield "random", seed, replace(measured, layers=layers)


def _ordered(layer: Measured, basis: Balance, values: Tensor) -> Measured:
    """A layer whose directions are those of `basis` and go by the squares of `values` per parameter."""
    return replace(layer, basis=basis._replace(values=values.double()), tokens_per_sample=1.0)

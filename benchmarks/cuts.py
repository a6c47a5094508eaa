"""`python -m benchmarks.cuts RUN`: trained LoRAs that are cut in different ways to one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import JsonFile, Runs, Threads, command_line, print_done, several
from benchmarks.rows import RowFile
from benchmarks.trained import TrainedLora, opened
from pedyra.fitting.calibration import lora_layers
from pedyra.fitting.curve import Ladder
from pedyra.fitting.gramians import Calibration, Measured
from pedyra.fitting.verdict import paired
from pedyra.fitting.wanted import Shape
from pedyra.fitting.worth import Balance, balance

CUTS_KEY = ("run", "way", "seed", "asked", "rows")
"""`asked` is the share that was given, of which a row has what came of it too."""
SHARES = (0.5, 0.25, 0.125)
RANDOM_SEEDS = 3
"""Random directions are drawn so often."""


def cuts(
    runs: Runs,
    shares: Annotated[
        list[float] | None, several("--share", "0.5, 0.25, 0.125", "Part of the parameters that is left")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=16, help="Rows to calibrate with. 1.5 times as many held-out rows are measured.")
    ] = 1024,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Cut trained LoRAs to one size in different ways, and measure by how much the loss rises with each."""
    file = RowFile(json_file, CUTS_KEY)
    found = file.keep(bench_cuts(runs, shares or SHARES, rows))
    print_done(found, ["run", "way", "share", "parameters", "increase", "standard_error"])


def bench_cuts(runs: Sequence[Path], shares: Sequence[float] = SHARES, rows: int = 1024) -> Iterator[dict[str, Any]]:
    """Yield a row for each run, way and size: the rise of the held-out loss, in pairs with the whole adapter.

    Ways: `fit`, as `pedyra fit` orders and cuts; `singular values`, of s B A, by their squares per parameter; `energy`,
    the same values, each layer keeping an equal part of its own squares, which is the rule of `peft.convert_to_lora`;
    `inputs`, which knows the inputs of a layer and not its gradients; `random` directions.

    Args:
        shares: parts of the parameters that are left.
        rows: of training, to calibrate with, at most; 1.5 times as many of those held out are measured on.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--share is {share}; it is the part that is left, above 0 and at most 1")
    for run in runs:
        opened(run)  # what is wrong with one is told before anything is measured
    for run in runs:
        yield from _cuts(run, shares, rows)


def _cuts(run: Path, shares: Sequence[float], rows: int) -> Iterator[dict[str, Any]]:
    trained = TrainedLora(run, rows, held_out=rows + rows // 2)
    for way, seed, calibration in ways(trained.model, replace(trained.calibration, repairs=False)):
        ladder = Ladder(calibration, Shape())
        for share in shares:
            size = ladder.point(ladder.at(share))
            increase = paired(trained.whole, trained.losses_at(size.ranks, calibration), trained.weights)
            yield {
                "run": str(run), "way": way, "seed": seed, "asked": share, "rows": rows,
                "share": size.share, "parameters": size.parameters,
                "loss": trained.mean(trained.whole), "increase": increase.mean, "standard_error": increase.error,
            }  # fmt: skip


def ways(model: Any, measured: Calibration) -> Iterator[tuple[str, int | None, Calibration]]:
    """Yield name, seed, and bases with values by which the directions are ordered."""
    yield "fit", None, measured
    singular, energy, inputs = {}, {}, {}
    for name, module in lora_layers(model).items():
        A, B = (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        layer, scaling = measured.layers[name], module.scaling["default"]
        left, right = A.double(), (scaling * B).double()
        basis = balance(left @ left.T, right.T @ right)  # white inputs and gradients: singular values
        singular[name] = _ordered(layer, basis, basis.values)
        squares = basis.values.square()
        left = squares.flip(0).cumsum(0).flip(0) / squares.sum()  # what goes, where this and all after it go
        energy[name] = _ordered(layer, basis, (left * layer.parameters).sqrt())
        of_inputs = layer.basis.inverse * layer.basis.values @ layer.basis.inverse.T  # E[h h^T]
        basis = balance(of_inputs, (scaling * B.double()).T @ (scaling * B.double()))
        inputs[name] = _ordered(layer, basis, basis.values)
    yield "singular values", None, replace(measured, layers=singular)
    yield "energy", None, replace(measured, layers=energy)
    yield "inputs", None, replace(measured, layers=inputs)
    for seed in range(RANDOM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, layer in singular.items():
            order = torch.randperm(layer.rank, generator=generator)
            worth = torch.rand(layer.rank, generator=generator).double().sort(descending=True).values
            layers[name] = layer.reordered(worth[order.argsort()])
        yield "random", seed, replace(measured, layers=layers)


def _ordered(layer: Measured, basis: Balance, values: Tensor) -> Measured:
    """Return a layer whose directions are those of `basis` and go by the squares of `values` per parameter."""
    return replace(layer, basis=basis._replace(values=values.double()), tokens_per_sample=1.0)


if __name__ == "__main__":
    command_line(cuts)

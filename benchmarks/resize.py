"""`python -m benchmarks.resize --out research/results/resize.jsonl` cuts by singular values in several ways.

One LoRA with the layers of a model and spectra that fall, on a CPU: time, and what is left out of the update by its
Frobenius norm, at the same rank and at the same energy. `pedyra` is the QR of the factors. `peft` is PEFT's own
`convert_to_lora`, whose rank is a number or a part of the energy. `sd-scripts` is the algorithm of its resize_lora as
we read it: the product of the factors and the first k of its whole singular value decomposition; of a matrix above
2,048 on both sides a randomised one, of twice the rank that is asked for and two iterations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, convert_to_lora, get_peft_model
from torch import Tensor, nn

from pedyra.lora.singular import singular

Pairs = dict[str, tuple[Tensor, Tensor]]
SHAPES = {
    # (outputs, inputs) of one block, and how many blocks.
    "minilm": ([(384, 384)] * 4 + [(1536, 384), (384, 1536)], 6),
    "llama-7b, one block of 32": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 1),
}


def factors(shapes: list[tuple[int, int]], blocks: int, rank: int) -> Pairs:
    """Draw factors whose singular values fall by a factor of four over the rank, in a basis that mixes them."""
    torch.manual_seed(0)
    fall = torch.logspace(0, -0.6, rank)
    found = {}
    for block in range(blocks):
        for number, (outputs, inputs) in enumerate(shapes):
            mixed = torch.randn(rank, rank)
            A = torch.linalg.solve(mixed, torch.randn(rank, inputs)) / inputs**0.5
            found[f"{block}_{number}"] = A, (torch.randn(outputs, rank) * fall) @ mixed
    return found


def by_pedyra(pairs: Pairs, size: float) -> Pairs:
    cut = {}
    for name, (A, B) in pairs.items():
        found = singular(A, B)
        cut[name] = found.factors(int(size) if size >= 1 else found.rank_of_energy(size))
    return cut


def by_sd_scripts(pairs: Pairs, size: float) -> Pairs:
    cut = {}
    for name, (A, B) in pairs.items():
        update = B @ A
        most = int(size) if size >= 1 else len(A)
        if min(update.shape) > 2048:
            U, values, V = torch.svd_lowrank(update, q=2 * most, niter=2)
            V = V.T
        else:
            U, values, V = torch.linalg.svd(update, full_matrices=False)
        energy = values.square().cumsum(0)
        rank = most if size >= 1 else min(most, int((energy < size * energy[-1]).sum()) + 1)
        cut[name] = V[:rank], U[:, :rank] * values[:rank]
    return cut


def by_peft(pairs: Pairs, size: float) -> Pairs:
    layers = {name: nn.Linear(A.shape[1], B.shape[0], bias=False) for name, (A, B) in pairs.items()}
    rank = len(next(iter(pairs.values()))[0])
    model: Any = get_peft_model(nn.ModuleDict(layers), LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)))  # pyright: ignore
    for name, (A, B) in pairs.items():
        layer = model.base_model.model[name]
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    started = time.perf_counter()
    _, state = convert_to_lora(model, rank=int(size) if size >= 1 else size)
    by_peft.seconds = time.perf_counter() - started  # pyright: ignore[reportFunctionMemberAccess]
    key = "base_model.model.{}.lora_{}.weight"
    return {name: (state[key.format(name, "A")], state[key.format(name, "B")]) for name in pairs}


def error(pairs: Pairs, cut: Pairs) -> float:
    """Return what is left out of the update, of all layers together, by its Frobenius norm."""
    gone = whole = 0.0
    for name, (A, B) in pairs.items():
        update = B.double() @ A.double()
        gone += float((update - cut[name][1].double() @ cut[name][0].double()).square().sum())
        whole += float(update.square().sum())
    return (gone / whole) ** 0.5


WAYS: dict[str, Callable[[Pairs, float], Pairs]] = {
    "pedyra": by_pedyra,
    "peft": by_peft,
    "sd-scripts": by_sd_scripts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, replaced")
    parser.add_argument("--largest", action="store_true", help="PEFT's cut at 7B too: minutes a layer")
    given = parser.parse_args()
    rows = []
    for model, (shapes, blocks) in SHAPES.items():
        rank = 16 if model == "minilm" else 64
        pairs = factors(shapes, blocks, rank)
        for size in (rank // 2, 0.95):
            for way, cut_by in WAYS.items():
                if way == "peft" and model != "minilm" and not given.largest:
                    continue
                started = time.perf_counter()
                cut = cut_by(pairs, size)
                seconds = time.perf_counter() - started
                if way == "peft":  # without the making of the model
                    seconds = by_peft.seconds  # pyright: ignore[reportFunctionMemberAccess]
                ranks = [len(A) for A, _ in cut.values()]
                row = {
                    "model": model, "rank": rank, "size": size, "method": way, "seconds": seconds,
                    "frobenius_error": error(pairs, cut), "mean_rank": sum(ranks) / len(ranks),
                    "layers": len(pairs), "peft": version("peft"), "threads": torch.get_num_threads(),
                }  # fmt: skip
                print(row, flush=True)
                rows.append(row)
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

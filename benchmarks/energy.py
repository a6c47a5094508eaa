"""`python -m benchmarks.energy RUN --rank 2` says which ranks a trained adapter's energy asks for.

A long run at a high rank shows where the update of a task is large. Of all its singular directions those with the most
energy (the squared singular value) a parameter are kept, until the parameters of a uniform LoRA of `--rank` are spent.
It prints a recipe's `lora` with these ranks, from which a training can begin: what no rank-adaptive method can know.
With `--beside` it prints how nearly the ranks of other runs are these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation
from typing import Annotated

import typer

from benchmarks.command import command_line, several
from pedyra.app.yaml_file import to_yaml
from pedyra.lora.files import read_rows
from pedyra.lora.folder import read_lora
from pedyra.lora.layer_names import pattern_keys
from pedyra.lora.singular import singular


def energy(
    run: Annotated[Path, typer.Argument(help="A run whose LoRA has a high rank.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Of the uniform LoRA whose parameters are spent.", min=1)] = 2,
    beside: Annotated[
        list[Path] | None, several("--beside", "none", "Runs in which ranks moved; the correlation is printed.")
    ] = None,
) -> None:
    """Print the ranks, as `lora` of a recipe or of a row of a comparison."""
    energies: dict[str, list[float]] = {}
    widths: dict[str, int] = {}
    lora = read_lora(run)
    for layer in lora.layers:
        update = singular(lora.tensors[layer.keys["A"]], lora.tensors[layer.keys["B"]])
        energies[layer.name] = (layer.scaling * update.values).square().tolist()
        widths[layer.name] = update.U.shape[0] + update.V.shape[1]
    ranks = ranks_by_energy(energies, widths, rank)
    for other in beside or ():
        moved = [row["ranks"] for row in read_rows(other / "ranks.jsonl") if "ranks" in row][-1]
        print(f"{other}: correlation {correlation([*ranks.values()], [moved[name] for name in ranks]):+.2f}")
    if beside:
        return
    keys = pattern_keys(ranks)
    left_out = [keys[name] for name, count in ranks.items() if not count]
    pattern = {keys[name]: count for name, count in ranks.items() if count}
    print(to_yaml({"rank_pattern": pattern, **({"exclude_modules": left_out} if left_out else {})}), end="")


def ranks_by_energy(energies: Mapping[str, Sequence[float]], widths: Mapping[str, int], rank: int) -> dict[str, int]:
    """Spend the parameters of a uniform `rank` on the directions with the most energy a parameter.

    Args:
        energies: layer -> those of its directions.
        widths: layer -> parameters of one direction.
    """
    left = rank * sum(widths.values())
    worth = sorted((-value / widths[name], name) for name, values in energies.items() for value in values)
    ranks = dict.fromkeys(energies, 0)
    for _, name in worth:
        if widths[name] <= left:
            ranks[name] += 1
            left -= widths[name]
    return ranks


if __name__ == "__main__":
    command_line(energy)

"""Every method by name, in the order of a table. Listing them imports no torch."""

from __future__ import annotations

from pedyra.lora.spelling import did_you_mean
from pedyra.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA (Hu et al. 2021)", "from_peft:lora", takes_ranks=True),
        Method("lora+", "LoRA whose B learns faster than its A (Hayou et al. 2024)", "loraplus", takes_ranks=True),
        Method("pissa", "LoRA from the weight's top triples (Meng et al. 2024)", "from_peft:pissa", takes_ranks=True),
        Method(
            "dora",
            "LoRA of a direction, and its magnitude (Liu et al. 2024)",
            "from_peft:lora",
            takes_ranks=True,
            lora={"use_dora": True},
        ),
        Method(
            "qlora",
            "LoRA over weights in 4 bits (Dettmers et al. 2023)",
            "from_peft:qlora",
            takes_ranks=True,
            quantization="nf4",
        ),
        Method("graded", "LoRA whose first ranks do alone (after Modoranu et al. 2026)", "graded", takes_ranks=True),
        Method("randlora", "full-rank from scaled random bases (Albert et al. 2025)", "randlora"),
        Method("eva", "LoRA with ranks and A from the inputs (Paischer et al. 2024)", "eva"),
        Method("gora", "LoRA with ranks and start from the gradient (He et al. 2025)", "gora"),
        Method("para", "LoRA of higher rank, cut after training at one threshold (2026)", "para"),
        Method(
            "adalora",
            "AdaLoRA (Zhang et al. 2023), PEFT's own: masked ranks",
            "adalora",
            resumable=False,
            moves_ranks=True,
        ),
        Method("adalora-svd", "AdaLoRA with ranks that are removed", "adalora_svd", moves_ranks=True),
        Method("increlora", "grows by the update's sensitivity (Zhang F. et al. 2023)", "increlora", moves_ranks=True),
        Method("triadaptlora", "grows where a core's norm rises (Liang et al. 2025)", "triadaptlora", moves_ranks=True),
        Method("elalora", "moves by each layer's weakest triples (Chang et al. 2025)", "elalora", moves_ranks=True),
        Method("l1ra", "gates under an L1 penalty; closed ones move (Singh et al. 2025)", "l1ra", moves_ranks=True),
        Method("dylora", "nested ranks, trained at once (Valipour et al. 2023)", "dylora"),
        Method("rasa", "ranks shared by all layers of a type (He et al. 2025)", "rasa"),
        Method("sora", "gates that proximal steps close (Ding et al. 2023)", "sora"),
        Method("autolora", "ranks from a bilevel search, then LoRA (Zhang R. et al. 2024)", "autolora"),
        Method("prune", "PE-DyRA's scores, pruning only (Table 5)", "prune", moves_ranks=True),
        Method("expand", "PE-DyRA's scores, expansion only (Table 5)", "expand", moves_ranks=True),
        Method("random", "PE-DyRA's moves, at random (Fig. 4a)", "random_moves", moves_ranks=True),
        Method("mask", "PE-DyRA's scores, lowest ranks masked to zero (Fig. 8)", "mask", moves_ranks=True),
        Method("pedyra-paper", "PE-DyRA as the paper has it", "pedyra_paper", moves_ranks=True),
        Method("pedyra", "ends with the smallest adapter that does the job", "pedyra.method", moves_ranks=True),
    )
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    raise ValueError(f"method {name!r} is unknown; {did_you_mean(name, METHODS)}")


def check_ranks(name: str) -> None:
    """Raise ValueError if the method does not keep ranks that are given by layer, with those that do."""
    if not get_method(name).takes_ranks:
        fitting = ", ".join(name for name, method in METHODS.items() if method.takes_ranks)
        raise ValueError(
            f"lora.ranks gives each layer its rank, but method {name} decides on ranks itself; "
            f"add method=lora (or one of {fitting}), or remove lora.ranks"
        )

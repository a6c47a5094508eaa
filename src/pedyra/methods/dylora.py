"""DyLoRA (Valipour et al. 2023): nested ranks. One run trains every rank up to r; any of them is cut out afterwards."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.method import Adaptation, Hooks, Method, Request, Settings
from pedyra.methods.own_factors import Factors, fill, linear_slots, write_plain


class DyLoraSettings(Settings):
    """Settings of DyLoRA."""

    rank: int | None = Field(None, ge=1)
    """The rank at which the model is evaluated, and to which it is cut after training. None: lora.r, the whole."""


class NestedRank(Hooks):
    """All layers of a model run at this rank, which is drawn anew for each optimizer step, and chosen for evaluation.

    Args:
        r: the largest rank.
        seed: of the draws; the same draws follow the same seed and step.
    """

    def __init__(self, r: int, *, seed: int) -> None:
        self.r = r
        self.chosen = self.drawn = r
        self.layers: list[AdaptedLayer] = []
        self._seed = seed

    def choose(self, rank: int) -> None:
        """Evaluate, merge and cut at this rank from now on. Raises ValueError: no rank of 1 to r."""
        if not 1 <= rank <= self.r:
            raise UserError(f"rank {rank} is none of this model; it was trained at ranks 1 to {self.r}")
        self.chosen = rank

    def step_begins(self, step: int) -> None:
        """Draw b ~ Uniform{1..r}, by the seed and the step's number alone: a resume repeats the draws."""
        self.drawn = Random(f"{self._seed}/{step}").randint(1, self.r)

    def rows(self, full: Tensor, dim: int) -> Tensor:
        """Take the first b of `full` along `dim` in training, with a gradient for the last one only, as in the authors'
        GLUE script: each row learns in one step of r."""
        earlier, last = full.narrow(dim, 0, self.drawn - 1), full.narrow(dim, self.drawn - 1, 1)
        return torch.cat([earlier.detach(), last], dim)


class NestedA(nn.Module):
    """The A slot maps x (..., in) -> x A[:b]^T (..., b). `rows` is the whole A `(r, in)`."""

    bias = None

    def __init__(self, rows: nn.Parameter, nested: NestedRank) -> None:
        super().__init__()
        self.rows, self.nested = rows, nested

    @property
    def weight(self) -> Tensor:
        """A at the chosen rank, for merging."""
        return self.rows[: self.nested.chosen]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.nested.rows(self.rows, 0) if self.training else self.weight)


class NestedB(nn.Module):
    """The B slot maps h (..., b) -> r/b h B[:, :b]^T; with PEFT's alpha/r, alpha/b in all. `columns` is B
    `(out, r)`."""

    bias = None

    def __init__(self, columns: nn.Parameter, nested: NestedRank) -> None:
        super().__init__()
        self.columns, self.nested = columns, nested

    @property
    def weight(self) -> Tensor:
        """r/b B at the chosen rank, for merging."""
        return self.columns[:, : self.nested.chosen] * (self.nested.r / self.nested.chosen)

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return F.linear(h, self.weight)
        return F.linear(h, self.nested.rows(self.columns, 1)) * (self.nested.r / self.nested.drawn)


def nest(model: PeftModel, *, seed: int = 0) -> NestedRank:
    """Give every LoRA layer of `model` nested factors, with the same Parameters; at rank r nothing changes. Raises
    ValueError: layers of different ranks, or ones that are no plain linear LoRA."""
    layers = linear_slots(model)
    ranks = sorted({layer.rank for layer in layers})
    if len(ranks) > 1:
        raise UserError(f"the layers have ranks {ranks}, but DyLoRA draws one rank for all; give them one r")
    nested = NestedRank(ranks[0], seed=seed)
    nested.layers = layers
    for layer in layers:
        fill(layer, NestedA(layer.a.A, nested), NestedB(layer.b.weight, nested))
    return nested


def truncate(model: PeftModel, nested: NestedRank, rank: int) -> None:
    """Cut every layer to its first `rank` rows: plain LoRA with r = rank and alpha as it was, so alpha / rank. Raises
    ValueError: as `NestedRank.choose`."""
    nested.choose(rank)
    factors = {}
    for layer in nested.layers:
        A, B = layer.a.rows[:rank], layer.b.columns[:, :rank]  # type: ignore[attr-defined, index]
        factors[layer] = Factors(A, B, layer.scaling * nested.r / rank)
    write_plain(model, factors)


def prepare(request: Request, settings: DyLoraSettings) -> Adaptation:
    """Make DyLoRA up to rank lora.r: each optimizer step uses the first b ranks only, scaled by alpha / b.

    All of lora.r is trained, so the parameters are LoRA's; what is saved is cut to `rank`. LoRA's start, and no score
    or pruning. `NestedRank.choose` has one trained model judged at any rank.

    Departs from the authors' code, and why: sqrt(r/b) on each of A and B is one r/b on B, the same function; b counts
    ranks, where theirs is an index that is off by one from them; the draws are seeded per step, for exact resumes. As
    theirs, a row outside the draw has a zero
    gradient but still moves by AdamW's momentum and weight decay. Raises ValueError: a rank above lora.r; DoRA, rsLoRA
    or a start whose ranks are in no nested order.
    """
    request.refuse_lora("DyLoRA defines its own start and scaling", "init", "use_dora", "use_rslora")
    r = request.lora.r
    rank = r if settings.rank is None else settings.rank
    if rank > r:
        raise UserError(
            f"method_settings.rank is {rank}, above the ranks that are trained, 1 to lora.r ({r}); lower it"
        )
    model = request.with_lora()
    nested = nest(model, seed=request.seed)
    nested.choose(rank)
    return Adaptation(model=model, hooks=nested, finish=lambda: truncate(model, nested, nested.chosen))


METHOD = Method("dylora", "nested ranks, trained at once (Valipour et al. 2023)", prepare, DyLoraSettings)

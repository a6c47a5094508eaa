"""DyLoRA (Valipour et al. 2023): nested ranks. One run trains every rank up to r; any of them is cut out afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_count
from pedyra.errors import UserError
from pedyra.methods.slots import OWN_START, Factors, Slot, fill, linear_slots, refuse_lora, write_plain


@dataclass(frozen=True, kw_only=True)
class DyLora(Method):
    """DyLoRA (Valipour et al. 2023): ranks 1 to r are trained at once, nested in each other, and one is cut out.

    The LoRA that it begins with has the largest rank, r, and LoRA's start. Each optimizer step uses the first b ranks
    only, scaled by alpha / b, with b drawn anew. There is no score or pruning. `NestedRank.choose` has one trained
    model judged at any rank.

    Departs from the authors' code, and why: sqrt(r/b) on each of A and B is one r/b on B, the same function; b counts
    ranks, where theirs is an index that is off by one from them; the draws are seeded per step, for exact resumes. As
    theirs, a row outside the draw has a zero gradient but still moves by AdamW's momentum and weight decay. Raises
    ValueError: a rank above r, layers of different ranks; DoRA, rsLoRA or a start whose ranks are in no nested order.
    """

    rank: int | None = None
    """The rank at which the model is evaluated, and to which it is cut after training. None: the LoRA's, the whole."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        check_count("seed", self.seed, 0)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> NestedRank:
        refuse_lora(model, adapter, "DyLoRA", (*OWN_START, "use_dora"))
        nested = NestedRank(model, adapter, seed=self.seed)
        if self.rank is not None:
            nested.choose(self.rank)
        nested.nest()
        return nested


class NestedRank(Work):
    """All layers of a model train at one rank, which is drawn anew for each optimizer step, and are evaluated at one
    that is chosen. Raises ValueError: layers of different ranks, or ones that are no plain linear LoRA."""

    def __init__(self, model: nn.Module, adapter: str = "default", *, seed: int = 0) -> None:
        self.model, self.adapter = model, adapter
        self.layers = linear_slots(model, adapter)
        ranks = sorted({layer.rank for layer in self.layers})
        if len(ranks) > 1:
            raise UserError(f"the layers have ranks {ranks}, but DyLoRA draws one rank for all; give them one r")
        self.r = self.eval_rank = self.train_rank = ranks[0]
        self._seed = seed

    def nest(self) -> None:
        """Give every layer nested factors, with the same Parameters; at rank r nothing changes."""
        for layer in self.layers:
            fill(layer, NestedA(layer.a.A, self), NestedB(layer.b.weight, self))

    def end(self) -> None:
        """Cut every layer to its first ranks: plain LoRA with alpha as it was, so alpha / rank."""
        factors = {}
        for layer in self.layers:
            A, B = layer.a.rows[: self.eval_rank], layer.b.columns[:, : self.eval_rank]  # type: ignore[attr-defined, index]
            factors[layer] = Factors(A, B, layer.scaling * self.r / self.eval_rank)
        write_plain(self.model, self.adapter, factors)

    def choose(self, rank: int) -> None:
        """Evaluate, merge and cut at this rank from now on. Raises ValueError: no rank of 1 to r."""
        if not 1 <= rank <= self.r:
            raise UserError(f"rank is {rank}, but the LoRA has ranks 1 to {self.r}; give one of them, or raise its r")
        self.eval_rank = rank

    def step_begins(self, step: int) -> None:
        """Draw b ~ Uniform{1..r}, by the seed and the step's number alone: a resume repeats the draws."""
        self.train_rank = Random(f"{self._seed}/{step}").randint(1, self.r)

    def rows(self, full: Tensor, dim: int) -> Tensor:
        """Take the first b of `full` along `dim` in training, with a gradient for the last one only, as in the authors'
        GLUE script: each row learns in one step of r."""
        earlier, last = full.narrow(dim, 0, self.train_rank - 1), full.narrow(dim, self.train_rank - 1, 1)
        return torch.cat([earlier.detach(), last], dim)


class NestedA(Slot):
    """The A slot maps x (..., in) -> x A[:b]^T (..., b). `rows` is the whole A `(r, in)`."""

    def __init__(self, rows: nn.Parameter, nested: NestedRank) -> None:
        super().__init__()
        self.rows, self.nested = rows, nested

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A at the chosen rank, for merging."""
        return self.rows[: self.nested.eval_rank]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.nested.rows(self.rows, 0) if self.training else self.weight)


class NestedB(Slot):
    """The B slot maps h (..., b) -> r/b h B[:, :b]^T; with PEFT's alpha/r, alpha/b in all. `columns` is B
    `(out, r)`."""

    def __init__(self, columns: nn.Parameter, nested: NestedRank) -> None:
        super().__init__()
        self.columns, self.nested = columns, nested

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """r/b B at the chosen rank, for merging."""
        return self.columns[:, : self.nested.eval_rank] * (self.nested.r / self.nested.eval_rank)

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            return F.linear(h, self.weight)
        return F.linear(h, self.nested.rows(self.columns, 1)) * (self.nested.r / self.nested.train_rank)

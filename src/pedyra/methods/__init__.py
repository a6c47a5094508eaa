"""Fine-tuning methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.allocate.contract import RankMethod
    from pedyra.config import RankConfig


def from_config(config: RankConfig) -> RankMethod:
    """The method of a RankConfig: the paper's where it has an `importance`, fit where that is the budget, else our
    default."""
    if config.importance is not None:
        from pedyra.methods.scored import paper_method

        return paper_method(config.importance)
    if config.budget == "fit":
        from pedyra.methods.fit.method import Fit

        return Fit()
    from pedyra.methods.pedyra.run import Pedyra

    return Pedyra()

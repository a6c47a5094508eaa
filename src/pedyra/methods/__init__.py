"""Fine-tuning methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.allocate.contract import RankMethod
    from pedyra.config import RankConfig


def from_config(config: RankConfig) -> RankMethod:
    """The method of a RankConfig: the paper's where it has an `importance`, else our own."""
    if config.importance is not None:
        from pedyra.pe_dyra.scored import paper_method

        return paper_method(config.importance)
    from pedyra.methods.pedyra.method import Fit

    return Fit()

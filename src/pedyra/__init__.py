"""Rank-adaptive LoRA fine-tuning at a fixed budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.adapters.attach import attach as attach
    from pedyra.adapters.attach import detach as detach
    from pedyra.config import RankConfig as RankConfig
    from pedyra.export import export_adapter as export_adapter
    from pedyra.training.callback import RankCallback as RankCallback
    from pedyra.training.rank_allocator import RankAllocator as RankAllocator

# Loaded on first use, so that `import pedyra` and `pedyra --help` load neither torch nor transformers.
_HOMES = {
    "RankConfig": "pedyra.config",
    "RankCallback": "pedyra.training.callback",
    "RankAllocator": "pedyra.training.rank_allocator",
    "attach": "pedyra.adapters.attach",
    "detach": "pedyra.adapters.attach",
    "export_adapter": "pedyra.export",
}

__all__ = ["RankConfig", "RankCallback", "RankAllocator", "attach", "detach", "export_adapter"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pedyra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

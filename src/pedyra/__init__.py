"""PE-DyRA, dynamic rank allocation for LoRA, whole and checkable; and Fit, which says how small a trained LoRA may be,
proves it, and writes the smaller one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.allocate.callback import RankCallback as RankCallback
    from pedyra.allocate.rank_allocator import RankAllocator as RankAllocator
    from pedyra.app.export.export import export_adapter as export_adapter
    from pedyra.fitting.result import Fit as Fit
    from pedyra.fitting.trainer import fit as fit
    from pedyra.lora.attach import attach as attach
    from pedyra.lora.attach import detach as detach
    from pedyra.pe_dyra.method import PeDyra as PeDyra

# Loaded on first use, so that `import pedyra` and `pedyra --help` load neither torch nor transformers.
_HOMES = {
    "PeDyra": "pedyra.pe_dyra.method",
    "RankCallback": "pedyra.allocate.callback",
    "RankAllocator": "pedyra.allocate.rank_allocator",
    "fit": "pedyra.fitting.trainer",
    "Fit": "pedyra.fitting.result",
    "attach": "pedyra.lora.attach",
    "detach": "pedyra.lora.attach",
    "export_adapter": "pedyra.app.export.export",
}

__all__ = ["PeDyra", "RankCallback", "RankAllocator", "fit", "Fit", "attach", "detach", "export_adapter"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pedyra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""PE-DyRA, dynamic rank allocation for LoRA, whole and checkable; and Fit, which says how small a trained LoRA may be,
proves it, and writes the smaller one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.allocate.rank_allocator import RankAllocator as RankAllocator
    from pedyra.app.export.export import export_adapter as export_adapter
    from pedyra.fitting.result import Fit as Fit
    from pedyra.lora.attach import attach as attach
    from pedyra.lora.attach import detach as detach
    from pedyra.pe_dyra.scored import PeDyra as PeDyra
    from pedyra.trainer.adapt import adapt as adapt
    from pedyra.trainer.fit import fit as fit
    from pedyra.trainer.prove import prove as prove

# Loaded on first use, so that `import pedyra` and `pedyra --help` load neither torch nor transformers.
_HOMES = {
    "PeDyra": "pedyra.pe_dyra.scored",
    "adapt": "pedyra.trainer.adapt",
    "RankAllocator": "pedyra.allocate.rank_allocator",
    "fit": "pedyra.trainer.fit",
    "Fit": "pedyra.fitting.result",
    "prove": "pedyra.trainer.prove",
    "attach": "pedyra.lora.attach",
    "detach": "pedyra.lora.attach",
    "export_adapter": "pedyra.app.export.export",
}

__all__ = ["adapt", "fit", "prove", "PeDyra", "RankAllocator", "Fit", "attach", "detach", "export_adapter"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pedyra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

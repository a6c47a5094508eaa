"""The system of the PE-DyRA paper, and every method that it compares with, for any Trainer; and Fit, which says how
small a trained LoRA may be, proves it, and writes the smaller one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pedyra.methods.names import CLASSES

if TYPE_CHECKING:
    from pedyra.allocate.rank_allocator import RankAllocator as RankAllocator
    from pedyra.export.export import export_adapter as export_adapter
    from pedyra.fitting.prove import Proof as Proof
    from pedyra.fitting.result import Fit as Fit
    from pedyra.lora.attach import attach as attach
    from pedyra.lora.attach import detach as detach
    from pedyra.methods.ablations import Expand as Expand
    from pedyra.methods.ablations import Mask as Mask
    from pedyra.methods.ablations import Prune as Prune
    from pedyra.methods.ablations import RandomMoves as RandomMoves
    from pedyra.methods.adalora import AdaLora as AdaLora
    from pedyra.methods.autolora import AutoLora as AutoLora
    from pedyra.methods.dylora import DyLora as DyLora
    from pedyra.methods.elalora import ElaLora as ElaLora
    from pedyra.methods.eva import Eva as Eva
    from pedyra.methods.gora import Gora as Gora
    from pedyra.methods.increlora import IncreLora as IncreLora
    from pedyra.methods.loraplus import LoraPlus as LoraPlus
    from pedyra.methods.rasa import Rasa as Rasa
    from pedyra.methods.sora import Sora as Sora
    from pedyra.methods.triadaptlora import TriAdaptLora as TriAdaptLora
    from pedyra.pe_dyra.method import PeDyra as PeDyra
    from pedyra.trainer.adapt import RankResult as RankResult
    from pedyra.trainer.adapt import adapt as adapt
    from pedyra.trainer.fit import fit as fit
    from pedyra.trainer.prove import prove as prove

# Loaded on first use, so that `import pedyra` and `pedyra --help` load neither torch nor transformers.
_METHODS = {name: module for name, module in reversed(CLASSES.values()) if name != "RandLora"}
_HOMES = {
    "adapt": "pedyra.trainer.adapt",
    "fit": "pedyra.trainer.fit",
    "prove": "pedyra.trainer.prove",
    **_METHODS,
    "RankAllocator": "pedyra.allocate.rank_allocator",
    "Fit": "pedyra.fitting.result",
    "Proof": "pedyra.fitting.prove",
    "RankResult": "pedyra.trainer.adapt",
    "attach": "pedyra.lora.attach",
    "detach": "pedyra.lora.attach",
    "export_adapter": "pedyra.export.export",
}

__all__ = [
    "AdaLora", "AutoLora", "DyLora", "ElaLora", "Eva", "Expand", "Fit", "Gora", "IncreLora", "LoraPlus", "Mask",
    "PeDyra", "Proof", "Prune", "RandomMoves", "RankAllocator", "RankResult", "Rasa", "Sora", "TriAdaptLora", "adapt",
    "attach", "detach", "export_adapter", "fit", "prove",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pedyra' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""The triples that an optimizer trains, and what becomes of its state when others are loaded in their place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import drop_unfit_state, rekey_state
from pedyra.lora.layer import AdaptedLayer


class TrainedTriples:
    """A, E and B of these layers as the optimizer holds them."""

    def __init__(self, layers: Sequence[AdaptedLayer], optimizer: Optimizer) -> None:
        self.layers, self.optimizer = layers, optimizer
        self.hold()

    @property
    def now(self) -> list[Tensor]:
        """A, E, B of every layer as they are in the model; E may be no Parameter, see `AFactor.train_e`."""
        return [factor for layer in self.layers for factor in layer.factors]

    def hold(self) -> None:
        """The optimizer has what is in the model."""
        self._held, self.renewed = self.now, True
        # Parameters by the dicts that modules keep them in: a tenth of the time of their attributes, in every step.
        self._slots = [
            (layer.a._parameters, "weight" if layer.a.e_fixed_at_one else "A", layer.a.A) for layer in self.layers
        ]
        self._slots += [(layer.b._parameters, "weight", layer.b.weight) for layer in self.layers]

    def rekey(self) -> bool:
        """Point the optimizer at Parameters that a load has put in the place of those it holds.

        Returns whether there was any of another rank. What is loaded at the same ranks is the same Parameters, but
        where the rank is 0, which is loaded by way of a zero row.
        """
        if all(slot.get(name) is held for slot, name, held in self._slots):
            return False
        loaded = {old: new for old, new in zip(self._held, self.now, strict=True) if old is not new}
        rekey_state(self.optimizer, loaded)
        drop_unfit_state(self.optimizer, list(loaded.values()))
        self.hold()
        return any(old.numel() or new.numel() for old, new in loaded.items())

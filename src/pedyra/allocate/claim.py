"""Which layers an allocator adapts, and that no second one adapts them too."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from pedyra.lora.attach import check_whole
from pedyra.lora.factors import AFactor
from pedyra.lora.layer import AdaptedLayer, holds_triples

_OWNERS: weakref.WeakKeyDictionary[AFactor, weakref.ref[object]] = weakref.WeakKeyDictionary()


def trainable(layers: Sequence[AdaptedLayer]) -> list[AdaptedLayer]:
    """The layers that are trained; a frozen one keeps its rank, since it has no gradient to be scored by. Raises
    ValueError: all of them are frozen."""
    trained = [layer for layer in layers if layer.a.A.requires_grad and layer.b.weight.requires_grad]
    if not trained and any(layer.a.A.requires_grad or layer.b.weight.requires_grad for layer in layers):
        raise ValueError(
            "only one of lora_A and lora_B is trained (LoRA-FA), and a rank moves with both; train both, or leave "
            "pedyra out"
        )
    if not trained:
        raise ValueError("every layer of the adapter is frozen; call model.set_adapter(name) before training")
    return trained


def check_device(layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError where the layers lie on several devices, or a factor is cut into shards.

    What is compared is computed over all of them.
    """
    check_whole(layers)
    devices = {str(layer.a.A.device) for layer in layers}
    if len(devices) > 1:
        raise ValueError(
            f"the adapter's layers lie on {', '.join(sorted(devices))}, but ranks are decided over all layers; "
            f"load the model on one device, with device_map={{'': 0}}"
        )


def claim(layers: Sequence[AdaptedLayer], owner: object) -> None:
    """Make `owner` the one allocator of these layers, until it gives them up or is gone. Raises ValueError: another one
    has a layer already."""
    for layer in layers:
        other = _OWNERS.get(layer.a)
        if other is not None and other() is not None:
            raise ValueError(
                f"adapter {layer.adapter!r} is already adapted by another RankAllocator; call its release() first"
            )
    for layer in layers:
        _OWNERS[layer.a] = weakref.ref(owner)
        layer.a.observer = None  # that of an owner which is gone without a release


def give_up(layers: Sequence[AdaptedLayer]) -> None:
    """The inverse of `claim`."""
    for layer in filter(holds_triples, layers):  # not deleted since, nor detached
        _OWNERS.pop(layer.a, None)

"""Which layers an allocator adapts, that no second one adapts them too, and which forward they take."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Sequence

from pedyra.lora.attach import check_whole
from pedyra.lora.factors import AFactor
from pedyra.lora.fused import fuse, unfuse
from pedyra.lora.layer import AdaptedLayer, holds_triples

logger = logging.getLogger(__name__)

MEASURED_ON = ("cpu",)
"""Devices on which the fused forward has been timed (docs/performance.md), and which "auto" means."""

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


def choose_forward(layers: Sequence[AdaptedLayer], fused: bool | str) -> int:
    """Fuse every layer that can be, or none; how many are, which is logged. See `RankSettings.fused`.

    A fused layer takes PEFT's forward wherever its own would not be exact, as under torch.compile.
    """
    measured = all(layer.a.A.device.type in MEASURED_ON for layer in layers)
    if not fused or (fused == "auto" and not measured):
        for layer in layers:
            unfuse(layer.module)
        logger.info("PEFT's forward runs in all %d layers (fused=%r)", len(layers), fused)
        return 0
    count = sum([fuse(layer.module) for layer in layers])
    if fused is True and not count:
        warnings.warn(
            "fused is on, but no layer can be fused: that takes a plain nn.Linear base, no dropout and no DoRA; "
            "PEFT's own forward runs",
            stacklevel=4,
        )
    logger.info("the fused forward runs in %d of %d layers, PEFT's in the others", count, len(layers))
    return count

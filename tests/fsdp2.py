"""accelerate's FSDP2 on a CPU, so that what is cut over processes can be tested without an accelerator."""

from __future__ import annotations

from typing import Any

import accelerate.accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState


class Fsdp2OnCpu(AcceleratorState):
    """As accelerate sets itself up on an accelerator; on a CPU it takes DDP, whatever it is told."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)


def cut_on_cpu() -> None:
    """From here on accelerate cuts models in this process as it does on an accelerator."""
    accelerate.accelerator.AcceleratorState = Fsdp2OnCpu

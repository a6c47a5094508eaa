"""What a method refuses, told before anything is trained: it adapts a model that nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pedyra.methods.data import Data
from pedyra.methods.loop import Loop
from pedyra.methods.method import Adaptation, Request
from pedyra.methods.registry import get_method


class _Looks(Exception):
    """A method has come to where it looks at data."""


def _look(*_: Any) -> Any:
    raise _Looks


_UNSEEN = Data(batches=_look, loss=_look, split=_look)


def check_refusals(request: Request, check: Callable[[Adaptation], None] = lambda adaptation: None) -> None:
    """Adapt the request's model, which is spent by it, and begin its training where `request.steps` are above 0.

    A method that looks at data is followed as far as that, and on the meta device as far as it needs no numbers.

    Args:
        check: raises ValueError for what else is wrong with what the method has made.

    Raises:
        ValueError: whatever would stop the run.
    """
    on_meta = any(parameter.is_meta for parameter in request.model.parameters())
    try:
        adaptation = get_method(request.method).prepare(replace(request, data=_UNSEEN))
        check(adaptation)
        if request.steps > 0:
            trained = [parameter for parameter in adaptation.model.parameters() if parameter.requires_grad]
            Loop(adaptation, torch.optim.SGD(trained), request.steps)
    except _Looks:
        return
    except RuntimeError:  # tensors without numbers raise it
        if not on_meta:
            raise

"""Every method stands here by its name, in the order of a table.

A new one takes its file, its name in `names.py`, and its row here.
"""

from __future__ import annotations

from pedyra.methods import (
    adalora,
    autolora,
    dylora,
    from_peft,
    increlora,
    pedyra,
    randlora,
    rasa,
    sora,
    triadaptlora,
)
from pedyra.methods.method import Method
from pedyra.methods.names import check_method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(from_peft.LORA, from_peft.LORA_PLUS, from_peft.PISSA, from_peft.DORA, from_peft.QLORA, randlora.METHOD),
        *(adalora.METHOD, adalora.SVD, increlora.METHOD, triadaptlora.METHOD),
        *(dylora.METHOD, rasa.METHOD, sora.METHOD, autolora.METHOD),
        *(*pedyra.ABLATIONS, pedyra.METHOD),
    )
}


def get_method(name: str) -> Method:
    """Return the method of this name. Raises ValueError: there is none; the message names the nearest."""
    check_method(name)
    return METHODS[name]

"""An adapter of a file on a live model: whether PEFT made of it what it holds, and one beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from pedyra.errors import UserError
from pedyra.lora.folder import MISFITS, SavedLora, check_finite, read_lora
from pedyra.lora.layer import peft_layers


def check_layers(lora: SavedLora, model: Any, adapter: str = "default") -> None:
    """Refuse a file whose layers are not those that PEFT made of it, which leaves out what the base lacks and begins
    anew what the file lacks: ValueError."""
    saved, made = [layer.name for layer in lora.layers], [layer.name for layer in peft_layers(model, adapter)]
    base = type(model.get_base_model()).__name__
    for some, others, told in ((saved, made, "is in the file and not in"), (made, saved, "is not in the file but in")):
        if gone := [name for name in some if name not in others]:
            raise UserError(
                f"{lora.title} does not fit the base model {base}: the layer {gone[0]} {told} the model; give the run "
                f"whose base it was trained on, or, where another version of transformers calls the layer otherwise, "
                f"load the adapter with PEFT and save it again"
            )


def add_adapter(model: PeftModel, path: Path, name: str) -> None:
    """Load the LoRA in `path` under this name beside the live ones, as PEFT loads it. Raises ValueError: it does not
    fit the live model, or was trained on another base."""
    lora = read_lora(path)
    check_finite(lora)
    live: Any = next(iter(model.peft_config.values()))
    bases = [lora.config.get("base_model_name_or_path"), live.base_model_name_or_path]
    if all(bases) and bases[0] != bases[1]:
        raise UserError(f"{path} is an adapter of the base {bases[0]}, and the live model is {bases[1]}")
    if lora.config.get("bias", "none") != "none" or live.bias != "none":
        raise UserError(f"{path} cannot be loaded beside another adapter, since one of them has biases of the base's")
    try:
        model.load_adapter(str(lora.folder), adapter_name=name)
    except MISFITS as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit the live model: {told}") from error
    check_layers(lora, model, name)

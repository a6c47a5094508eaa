"""Base models (`load_tokenizer`, `load_model`, `shape_of`, `positions`), and a recipe's LoRA (`lora_config`,
`layer_ranks`)."""

from pedyra.app.models.base import load_model, load_tokenizer, lora_config, positions, shape_of
from pedyra.app.models.ranks import layer_ranks

__all__ = ["load_tokenizer", "load_model", "lora_config", "layer_ranks", "positions", "shape_of"]

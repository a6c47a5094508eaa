"""Base models (`load_tokenizer`, `load_model`, `shape_of`, `positions`), and a recipe's LoRA (`lora_config`,
`layer_ranks`)."""

from pedyra.app.models.base import load_model, load_tokenizer, positions, shape_of
from pedyra.app.models.lora import check_names, layer_ranks, lora_config

__all__ = ["load_tokenizer", "load_model", "lora_config", "layer_ranks", "check_names", "positions", "shape_of"]

"""Base models (`load_tokenizer`, `load_model`, `shape_of`, `positions`), and a recipe's LoRA (`lora_config`)."""

from pedyra.app.models.base import load_model, load_tokenizer, positions, shape_of
from pedyra.app.models.lora import check_names, lora_config

__all__ = ["load_tokenizer", "load_model", "lora_config", "check_names", "positions", "shape_of"]

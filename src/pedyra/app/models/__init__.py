"""Base models: `load_tokenizer`, `load_model`, `positions`, and the LoRA of a recipe: `lora_config`, `layer_ranks`."""

from pedyra.app.models.base import load_model, load_tokenizer, positions
from pedyra.app.models.lora import check_names, layer_ranks, lora_config

__all__ = ["load_tokenizer", "load_model", "lora_config", "layer_ranks", "check_names", "positions"]

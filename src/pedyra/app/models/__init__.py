"""Base models and what is known of them without their weights, and a recipe's LoRA."""

from pedyra.app.models.base import class_names, load_model, load_tokenizer, positions, shape_of
from pedyra.app.models.lora import check_names, lora_config

__all__ = ["class_names", "load_tokenizer", "load_model", "lora_config", "check_names", "positions", "shape_of"]

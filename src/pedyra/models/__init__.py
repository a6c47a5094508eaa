"""Base models: `load_tokenizer`, `load_model`, and the LoRA that a recipe asks for, `lora_config`."""

from pedyra.models.base import load_model, load_tokenizer, lora_config

__all__ = ["load_tokenizer", "load_model", "lora_config"]

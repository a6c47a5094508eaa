"""Base models and what is known of them without their weights, and a recipe's LoRA."""

"""A recipe's base model is loaded, or known without its weights, and gets its LoRA."""

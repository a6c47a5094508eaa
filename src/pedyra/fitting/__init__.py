"""How large a LoRA has to be: what its directions are worth, the curve of loss against parameters, and the cut."""

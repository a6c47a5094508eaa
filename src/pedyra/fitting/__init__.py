"""This room says how small a LoRA may be, cuts it, and proves on held-out rows what that costs."""

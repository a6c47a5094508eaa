"""Rank-adaptive LoRA in a hand-written loop. Run: python examples/own_loop.py"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra import RankAllocator, RankConfig


def main(steps: int = 400) -> RankAllocator:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2", "4"]))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = RankAllocator(model, optimizer, RankConfig(tolerance=0.05), total_steps=steps)
    weight = torch.randn(16, 4)
    for step in range(steps):
        x = torch.randn(64, 16)

        def loss_of_batch(x: torch.Tensor = x) -> torch.Tensor:
            return (model(x) - torch.tanh(x @ weight)).square().mean()

        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        allocator.before_step(closure=loss_of_batch)  # measures, or asks with and without some directions
        optimizer.step()
        optimizer.zero_grad()
        record = allocator.after_step()  # at an adjustment: removes what is not needed, moves optimizer state
        if record is not None:
            print(f"step {step + 1}: loss {loss.item():.4f}, ranks {list(record['ranks'].values())}")
    allocator.release()  # also of a loop that is broken off: no hook stays on the model
    return allocator


if __name__ == "__main__":
    main()

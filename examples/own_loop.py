"""Ranks that move in a training loop of one's own. Run: python examples/own_loop.py (ten seconds)

The target differs from the base by an update of rank 8 in the last layer alone. Look at the ranks: every layer begins
with 5, their sum stays 15, and triples move to where the update is.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pedyra import PeDyra, RankAllocator


def main(steps: int = 600) -> RankAllocator:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 128))
    update = torch.linalg.qr(torch.randn(128, 8)).Q @ torch.randn(8, 32) / 2  # of rank 8, in the last layer alone
    teacher = nn.Sequential(*base[:-1], nn.Linear(32, 128))
    teacher[4].load_state_dict({"weight": base[4].weight + update, "bias": base[4].bias})

    model = get_peft_model(base, LoraConfig(r=5, lora_alpha=40, target_modules=["0", "2", "4"]))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    allocator = RankAllocator(model, optimizer, PeDyra(moves=1, interval=20), total_steps=steps)
    for step in range(1, steps + 1):
        x = torch.randn(64, 32)
        with torch.no_grad():
            y = teacher(x) + 0.1 * torch.randn(64, 128)
        loss = (model(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        allocator.before_step()  # the method reads the gradients
        optimizer.step()
        optimizer.zero_grad()
        record = allocator.after_step()  # at an adjustment ranks change, and the optimizer's state with them
        if record is not None:
            print(f"step {step:3d}  loss {loss.item():.4f}  ranks {list(record['ranks'].values())}")
    allocator.release()  # also of a loop that is broken off: no hook stays on the model
    return allocator


if __name__ == "__main__":
    main()

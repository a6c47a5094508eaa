"""What SGLang's own loader makes of adapter folders: a line of JSON [FOLDER, OUT, MAX_LORA_RANK, BASE] in, a line out.

Runs in a process of its own, with SGLang's wheel on the path. The config is checked as that of an adapter which is
loaded into a running server, its tensors are read and stacked (q, k and v into one, gate and up into one), and copied
into a slot of SGLang's memory pool, for one GPU and on a CPU. The update of each stacked layer is read from that slot.
Writes these to OUT, and says what it found. No kernel runs.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.load_config import LoadConfig  # pyright: ignore[reportMissingImports]
from sglang.srt.lora.lora import LoRAAdapter  # pyright: ignore[reportMissingImports]
from sglang.srt.lora.lora_config import LoRAConfig  # pyright: ignore[reportMissingImports]
from sglang.srt.lora.lora_manager import LoRAManager  # pyright: ignore[reportMissingImports]
from sglang.srt.lora.mem_pool import LoRAMemoryPool  # pyright: ignore[reportMissingImports]
from sglang.srt.runtime_context import get_parallel  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM

STACKED = {"qkv_proj": 3, "gate_up_proj": 2, "o_proj": 1, "down_proj": 1}


class OneGpu(torch.nn.Module):
    """A wrapped layer that is on one GPU whole, so that nothing of a factor is sliced away."""

    def slice_lora_a_weights(self, A: torch.Tensor) -> torch.Tensor:
        return A

    def slice_lora_b_weights(self, B: torch.Tensor) -> torch.Tensor:
        return B


def read(folder: str, out: str, rank: int, base: str) -> dict:
    config = LoRAConfig(folder)
    architecture = AutoConfig.from_pretrained(base)
    server = SimpleNamespace(attn_dp_enabled=False, lora_refs={}, memory_pool=None)
    reference = SimpleNamespace(lora_name="adapter", lora_path=folder, pinned=False)
    LoRAManager.validate_new_adapter(server, config, reference)
    adapter = LoRAAdapter("adapter", config, architecture, LoadConfig(), None)
    adapter.initialize_weights_from_tensors(load_file(f"{folder}/adapter_model.safetensors"))
    with get_parallel().override(tp_size=1, tp_rank=0, attn_tp_size=1):
        model = AutoModelForCausalLM.from_pretrained(base)
        pool = LoRAMemoryPool(architecture, 1, torch.float32, rank, set(STACKED), model, "lru", 0)
        if not pool.can_support(config):
            raise ValueError(f"rank {config.r} is above the server's {rank}, or a module is not the server's")
        modules = [
            {f"model.layers.{layer}.{name}": OneGpu() for name in STACKED}
            for layer in range(architecture.num_hidden_layers)
        ]
        pool.load_lora_weight_to_buffer("adapter", 0, adapter, modules, None, None)
    updates = {}
    for name, parts in STACKED.items():
        for layer in range(architecture.num_hidden_layers):
            A, B = pool.A_buffer[name][layer][0], pool.B_buffer[name][layer][0]
            # The parts of a stacked layer follow one another in A at the adapter's rank, and share the columns of B.
            used = [A[part * config.r : (part + 1) * config.r] for part in range(parts)]
            heads = architecture.num_key_value_heads * architecture.head_dim
            rows = {3: [len(B) - 2 * heads, heads, heads], 2: [len(B) // 2] * 2, 1: [len(B)]}[parts]
            slices = torch.split(B[:, : config.r], rows)
            updates[f"{layer}.{name}"] = adapter.scaling * torch.cat([b @ a for a, b in zip(used, slices, strict=True)])
    save_file(updates, out)
    held = [buffer for pools in (pool.A_buffer, pool.B_buffer) for buffers in pools.values() for buffer in buffers]
    return {"scaling": adapter.scaling, "reserved": sum(buffer.numel() for buffer in held)}


for line in sys.stdin:
    try:
        found = read(*json.loads(line))
    except (ValueError, KeyError, AssertionError, RuntimeError) as error:
        found = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print("READ", json.dumps({**found, "version": version("sglang")}), flush=True)

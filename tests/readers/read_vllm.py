"""What vLLM's own loader makes of adapter folders: a line of JSON [FOLDER, OUT, MAX_LORA_RANK] in, a line out.

Runs in a process of its own, with the modules of vLLM's wheel on the path: no kernel, no model and no server, but the
check of the config, the reading of the tensors, the scaling of each layer and the names, all of them vLLM's. Writes the
update of each layer to OUT, and says what it found.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig  # pyright: ignore[reportMissingImports]
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

# The linear layers of a Llama, as vLLM tells its loader the modules that the model has.
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read(folder: str, out: str, rank: int) -> dict[str, Any]:
    try:
        helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
        helper.validate_legal(LoRAConfig(max_lora_rank=rank))  # pyright: ignore[reportArgumentType]
        model = LoRAModel.from_local_checkpoint(folder, MODULES, helper, device="cpu:0")  # under "cpu" it pins memory
    except (ValueError, RuntimeError) as error:
        return {"refused": " ".join(str(error).split())}
    updates = {}
    for name, layer in model.loras.items():
        layer.optimize()  # the scaling goes into B, as before the weights are copied into a slot
        updates[name] = (layer.lora_b.float() @ layer.lora_a.float()).contiguous()
    save_file(updates, out)
    return {"modules_to_save": sorted(model.modules_to_save)}


for line in sys.stdin:
    print("READ", json.dumps({**read(*json.loads(line)), "version": version("vllm")}), flush=True)

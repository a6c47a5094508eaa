"""What vLLM makes of adapter folders: a line of JSON [FOLDER, OUT, MAX_LORA_RANK] in, a line out.

Runs in a process of its own, with the modules of vLLM's wheel on the path: no kernel and no server, but the check of
the config, the reading of the tensors, the scaling of each layer and the names, all of them vLLM's. Writes the update
of each layer to OUT, and says what it found.

With [..., BASE, MODULES, TOKENS] the folder is served on a classifier: vLLM's own class of the model has the weights of
the folder BASE, its LoRA manager wraps the layers (of these modules, or null: all that it can), and the logits of the
tokens go to OUT. Attention alone is torch's, since vLLM's is a compiled kernel.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import vllm.platforms  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from vllm.platforms.cpu import CpuPlatform  # pyright: ignore[reportMissingImports]

vllm.platforms._current_platform = CpuPlatform()  # the wheel is that of CUDA

from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config  # pyright: ignore[reportMissingImports] # noqa
from vllm.config.lora import LoRAConfig  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.distributed import (  # pyright: ignore[reportMissingImports] # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.lora.layers import LoRAMapping  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.lora.model_manager import LoRAModelManager  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.lora.worker_manager import WorkerLoRAManager  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.model_executor.models import ModelRegistry, bert  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.pooling_params import PoolingParams  # pyright: ignore[reportMissingImports] # noqa: E402
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates  # pyright: ignore[reportMissingImports] # noqa: E402

# The linear layers of a Llama, as vLLM tells its loader the modules that the model has.
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read(folder: str, out: str, rank: int) -> dict[str, Any]:
    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=rank))  # pyright: ignore[reportArgumentType]
    model = LoRAModel.from_local_checkpoint(folder, MODULES, helper, device="cpu:0")  # under "cpu" it pins memory
    updates = {}
    for name, layer in model.loras.items():
        layer.optimize()  # the scaling goes into B, as before the weights are copied into a slot
        updates[name] = (layer.lora_b.float() @ layer.lora_a.float()).contiguous()
    save_file(updates, out)
    return {"modules_to_save": sorted(model.modules_to_save)}


class Attention(torch.nn.Module):
    """Every token of one text attends to all of them."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **_: Any) -> None:
        super().__init__()
        self.shape, self.scale = (-1, num_heads, head_size), scale

    def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(self.shape).transpose(0, 1) for part in qkv)
        texts = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return texts.transpose(0, 1).flatten(1)


bert.EncoderOnlyAttention = Attention


@torch.no_grad()
def classify(
    folder: str, out: str, rank: int, base: str, modules: list[str] | None, tokens: list[int]
) -> dict[str, Any]:
    lora = LoRAConfig(max_lora_rank=rank, target_modules=modules, lora_dtype=torch.float32)  # pyright: ignore
    model_config = ModelConfig(model=base, dtype="float32", enforce_eager=True, skip_tokenizer_init=True)
    config = VllmConfig(model_config=model_config, lora_config=lora)
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            place = f"file://{tempfile.mkdtemp()}/{os.getpid()}"
            init_distributed_environment(1, 0, place, 0, "gloo")
            initialize_model_parallel()
        kind, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
        model = kind(vllm_config=config)
        loaded = model.load_weights(load_file(f"{base}/model.safetensors").items())
        assert {name for name, _ in model.named_parameters()} == set(loaded)
        for module in model.modules():
            if hasattr(module, "quant_method"):
                module._cpu_skip_gemm_dispatch = True  # vLLM's kernel for a product of matrices is compiled
                module.quant_method.process_weights_after_loading(module)
        vocabulary = model_config.get_vocab_size()
        manager = LoRAModelManager(model, 1, 64, vocabulary, lora, torch.device("cpu"), config)
        worker = object.__new__(WorkerLoRAManager)  # its own __init__ wants a server's configuration
        worker._adapter_manager, worker.lora_config, worker._lora_model_cls = manager, lora, LoRAModel
        worker.max_position_embeddings, worker.vocab_size = None, vocabulary
        adapter = worker._load_adapter(LoRARequest("adapter", 1, folder))
        manager.add_adapter(adapter)
        manager.activate_adapter(1)
        count = len(tokens)
        manager.set_adapter_mapping(LoRAMapping((1,) * count, (1,), is_prefill=True))
        hidden = model(torch.tensor(tokens), torch.arange(count))
        rows = PoolingMetadata(
            prompt_lens=torch.tensor([count]), prompt_token_ids=None, prompt_token_ids_cpu=None,
            pooling_params=[PoolingParams(task="classify", use_activation=False)], pooling_states=[PoolingStates()],
        )  # fmt: skip
        rows.build_pooling_cursor(np.array([count]), torch.tensor([count]), torch.device("cpu"))
        save_file({"logits": model.pooler(hidden, rows)[0].contiguous()}, out)
    return {"class": kind.__name__, "dropped": sorted(set(adapter.loras) - set(manager.modules))}


for line in sys.stdin:
    arguments = json.loads(line)
    try:
        found = read(*arguments) if len(arguments) == 3 else classify(*arguments)
    except (ValueError, RuntimeError) as error:
        found = {"refused": " ".join(str(error).split())}
    print("READ", json.dumps({**found, "version": version("vllm")}), flush=True)

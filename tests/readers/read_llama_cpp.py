"""What llama.cpp says with an adapter: a line of JSON [BASE.gguf, ADAPTER.gguf, OUT, TOKENS] in, a line out.

Runs in a process of its own, with the llama.cpp library of the package llama-cpp-py-sync. Writes the logits after each
token to OUT.
"""

from __future__ import annotations

import json
import sys

import torch
from llama_cpp_py_sync import __llama_cpp_tag__  # pyright: ignore[reportMissingImports]
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

ffi, lib = get_ffi(), get_lib()
lib.llama_backend_init()


def read(base: str, adapter: str, out: str, tokens: list[int]) -> None:
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(base.encode(), settings)
    assert model != ffi.NULL, f"llama.cpp does not load {base}"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads = 64, 64, 1
    # Half precision in the cache and in flash attention is off by 0.01 in log-probability, which is no adapter's.
    settings.flash_attn_type, settings.type_k, settings.type_v = 0, 0, 0
    context = lib.llama_init_from_model(model, settings)
    loaded = lib.llama_adapter_lora_init(model, adapter.encode())
    assert loaded != ffi.NULL, f"llama.cpp does not load {adapter}"
    adapters, scales = ffi.new("struct llama_adapter_lora *[]", [loaded]), ffi.new("float[]", [1.0])
    assert lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    logits = []
    for token in tokens:  # one at a time: a batch gives the logits of its last token
        held = ffi.new("llama_token[]", [token])  # the batch has a pointer to it alone
        assert lib.llama_decode(context, lib.llama_batch_get_one(held, 1)) == 0
        logits.append(torch.tensor(ffi.unpack(lib.llama_get_logits_ith(context, -1), size)))
    save_file({"logits": torch.stack(logits)}, out)


for line in sys.stdin:
    read(*json.loads(line))
    print("READ", json.dumps({"version": __llama_cpp_tag__}), flush=True)

"""The readers themselves, from their own packages: `make readers` installs what can be had, and runs these tests.

A reader runs in a process of its own, since vLLM and SGLang change logging and torch in the one that imports them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
INSTALLED = Path(os.environ.get("PEDYRA_READERS", HERE.parents[1] / "build" / "readers"))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of bytes, which each converter takes."""
    torch.manual_seed(0)
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {text: number for number, text in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256))])}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a LoRA that changes the base clearly; arguments are those of LoraConfig."""

    def make(**settings: Any) -> Path:
        torch.manual_seed(1)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": list(ALL), "task_type": "CAUSAL_LM"} | settings
        )
        model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def reader() -> Callable[..., dict[str, Any]]:
    """Runs a script, of this folder or of what is installed, with these installed packages in front. Returns the JSON
    that one of this folder prints last."""

    def run(script: str, packages: tuple[str, ...], *arguments: Any) -> dict[str, Any]:
        missing = [name for name in packages if not (INSTALLED / name).is_dir()]
        if missing:
            pytest.skip(f"{' and '.join(missing)} not in {INSTALLED}; make readers installs what can be had")
        path = next(place / script for place in (HERE, INSTALLED) if (place / script).is_file())
        places = os.pathsep.join(str(INSTALLED / name) for name in packages)
        done = subprocess.run(
            [sys.executable, str(path), *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]) if path.parent == HERE else {}

    return run

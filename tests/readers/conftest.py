"""The readers themselves, from their own packages: `make readers` installs what can be had, and runs these tests.

A reader runs in a process of its own, since vLLM and SGLang change logging and torch in the one that imports them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


def environment(packages: tuple[str, ...]) -> dict[str, str]:
    """With these installed packages in front; skips a test whose packages are not there."""
    missing = [name for name in packages if not (INSTALLED / name).is_dir()]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not in {INSTALLED}; make readers installs what can be had")
    places = os.pathsep.join(str(INSTALLED / name) for name in packages)
    return dict(os.environ) | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[..., dict[str, Any]]]:
    """ask("vllm", ...) sends these arguments to the reader's process, which lives as long as the tests, since it takes
    half a minute to import what it reads with. Returns what it says."""
    running: dict[str, subprocess.Popen[str]] = {}

    def asked(name: str, *arguments: Any) -> dict[str, Any]:
        if name not in running:
            script = str(HERE / f"read_{name}.py")
            running[name] = subprocess.Popen(
                [sys.executable, script], env=environment((name, "site")), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        process = running[name]
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(arguments, default=str) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("READ "):
                return json.loads(line.removeprefix("READ "))
        raise AssertionError(f"{name} ended with {process.wait()}")

    yield asked
    for process in running.values():
        assert process.stdin and process.stdout
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@pytest.fixture
def convert() -> Callable[..., bool]:
    """Runs a script of llama.cpp on these arguments: whether it takes them."""

    def run(script: str, *arguments: Any) -> bool:
        place = environment(("llama_cpp_source", "site"))
        command = [sys.executable, str(INSTALLED / "llama_cpp_source" / script), *map(str, arguments)]
        return subprocess.run(command, env=place, capture_output=True, timeout=600).returncode == 0

    return run

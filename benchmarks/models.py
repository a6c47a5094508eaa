"""The speed benchmarks run these models: MiniLM, and random Llamas of any width and depth."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, set_seed

from pedyra.app.models.packaged import minilm_folder
from pedyra.errors import UserError

_VOCABULARY = 1000


@dataclass(frozen=True)
class BenchModel:
    """A base model, the kind of its head, and the shape of one training batch."""

    name: str
    load: Callable[[], nn.Module]
    task_type: str
    vocab_size: int
    batch: int
    length: int

    @property
    def exclude(self) -> str | None:
        """Return the linear layers without an adapter: a classifier's pooler, which sees one token a row."""
        return r".*pooler.*" if self.task_type == "SEQ_CLS" else None

    def build(self) -> nn.Module:
        """Make a copy; all have the same weights."""
        set_seed(0)
        return self.load()

    def with_batch(self, batch: int | None, length: int | None) -> BenchModel:
        """Return the same model on batches of another shape; None keeps."""
        return replace(self, batch=batch or self.batch, length=length or self.length)

    def example(self, seed: int = 0) -> dict[str, Tensor]:
        """Draw a batch on the CPU; rows are padded by nothing, an eighth, a quarter, three eighths."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocab_size, (self.batch, self.length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(self.batch):
            mask[row, self.length - (row % 4) * self.length // 8 :] = 0
        labels = torch.where(mask > 0, ids, -100)
        if self.task_type == "SEQ_CLS":
            labels = torch.randint(0, 2, (self.batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bench_model(name: str, dtype: torch.dtype = torch.float32) -> BenchModel:
    """Return the model of this name: minilm, or llama-WIDTHxDEPTH, e.g. llama-256x8."""
    if name == "minilm":
        load = partial(AutoModelForSequenceClassification.from_pretrained, minilm_folder(), dtype=dtype)
        return BenchModel(name, load, "SEQ_CLS", 30_000, batch=32, length=64)
    match = re.fullmatch(r"llama-(\d+)x(\d+)", name)
    width, depth = map(int, match.groups()) if match else (0, 0)
    if not width or width % 32 or not depth:
        raise UserError(
            f"model {name!r} is unknown; choose minilm, or llama-WIDTHxDEPTH with a width that is a multiple of 32 and "
            f"a depth of at least 1, e.g. llama-256x8"
        )
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=width, num_hidden_layers=depth, intermediate_size=4 * width,
        num_attention_heads=width // 32, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    load = partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
    return BenchModel(name, load, "CAUSAL_LM", _VOCABULARY, batch=8, length=64)

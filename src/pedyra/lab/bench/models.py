"""The models that the speed benchmarks run: two real ones, and random Llama and DeBERTa-v3 of any width and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    LlamaConfig,
    set_seed,
)

from pedyra.app.models.packaged import minilm_folder, smollm2_folder
from pedyra.lab.bench.names import model_shape

_VOCABULARY = 1000


@dataclass(frozen=True)
class BenchModel:
    """A base model, the kind of its head, and the shape of one training batch."""

    name: str
    build: Callable[[], nn.Module]
    task_type: str
    vocab_size: int
    batch: int
    length: int

    @property
    def exclude(self) -> str | None:
        """Linear layers without an adapter: a classifier's pooler, which sees one token a row."""
        return r".*pooler.*" if self.task_type == "SEQ_CLS" else None

    def with_batch(self, batch: int | None, length: int | None) -> BenchModel:
        """The same model on batches of another shape; None keeps."""
        return replace(self, batch=batch or self.batch, length=length or self.length)

    def example(self, seed: int = 0) -> dict[str, Tensor]:
        """A random batch on the CPU; rows are padded by nothing, an eighth, a quarter, three eighths."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocab_size, (self.batch, self.length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(self.batch):
            mask[row, self.length - (row % 4) * self.length // 8 :] = 0
        labels = torch.where(mask > 0, ids, -100)
        if self.task_type == "SEQ_CLS":
            labels = torch.randint(0, 2, (self.batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bench_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> BenchModel:
    """minilm, smollm2, llama-WIDTHxDEPTH or deberta-WIDTHxDEPTH, e.g. llama-256x8.

    Raises:
        ValueError: another name. ImportError: the package that carries a real model is missing.
    """
    kind, width, depth = model_shape(name)
    if name == "minilm":
        folder = minilm_folder()
        build = _seeded(seed, lambda: AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype))
        return BenchModel(name, build, "SEQ_CLS", 30_000, batch=32, length=64)
    if name == "smollm2":
        folder = smollm2_folder()
        build = _seeded(seed, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        return BenchModel(name, build, "CAUSAL_LM", 49_000, batch=4, length=128)
    shape: dict[str, Any] = dict(vocab_size=_VOCABULARY, hidden_size=width, num_hidden_layers=depth, pad_token_id=0)
    shape |= dict(intermediate_size=4 * width, num_attention_heads=width // 32, max_position_embeddings=4096)
    if kind == "llama":
        config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)
        build = _seeded(seed, lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        return BenchModel(name, build, "CAUSAL_LM", _VOCABULARY, batch=8, length=64)
    shape |= dict(relative_attention=True, position_buckets=64, norm_rel_ebd="layer_norm", share_att_key=True)
    config = DebertaV2Config(**shape, pos_att_type=["p2c", "c2p"], type_vocab_size=0)  # as microsoft/deberta-v3-base
    build = _seeded(seed, lambda: AutoModelForSequenceClassification.from_config(config, dtype=dtype))
    return BenchModel(name, build, "SEQ_CLS", _VOCABULARY, batch=8, length=64)


def _seeded(seed: int, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        set_seed(seed)
        return build()

    return seeded

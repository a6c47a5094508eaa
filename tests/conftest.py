"""Models of a few hundred parameters, and the loops that train them. Shapes of pure functions are checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import pytest
import torch
from arithmetic import ARITHMETIC
from hypothesis import settings
from torch import Tensor, nn

# Before anything imports these: their jaxtyping annotations become checks, for the whole suite.
jaxtyping.install_import_hook(ARITHMETIC, "beartype.beartype")

# One thread is fastest for models as small as these; more, or ATEN_CPU_CAPABILITY=default, round otherwise.
torch.set_num_threads(int(os.environ.get("PEDYRA_TEST_THREADS", "1")))

# Property tests: the same few examples at every run; `pytest --hypothesis-profile=soak` draws thousands of new ones.
settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True, database=None)
settings.register_profile("soak", max_examples=1000, deadline=None, database=None, print_blob=True)
settings.load_profile("suite")

pytest_plugins = ["trainer_runs"]

WIDTHS = (8, 12, 6, 6)
"""Of the layers of `Net`: layer i maps WIDTHS[i] to WIDTHS[i + 1] features."""


class Net(nn.Module):
    """Three linears of unequal shape with tanh between them; a triple costs 21, 19 and 13 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def _trusts_nobody() -> Iterator[None]:
    """`--trust-remote-code` of a command that a test runs in this process holds for that test alone."""
    yield
    os.environ.pop("PEDYRA_TRUST_REMOTE_CODE", None)


@pytest.fixture
def make_net() -> Callable[..., Any]:
    """make_net(trained=True, **LoraConfig settings): a PEFT model around `Net`, the same one for the same settings.

    trained: B is random instead of zero, as if the adapter had learned something.
    """
    from peft import LoraConfig, get_peft_model

    def make(*, trained: bool = False, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1", "2"], **settings}
        model: Any = get_peft_model(Net().to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
        if trained:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def make_bert() -> Callable[..., Any]:
    """make_bert(**LoraConfig settings): a tiny random BERT classifier with LoRA on all of its encoder's linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    def make(**settings: Any) -> Any:
        torch.manual_seed(2)
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        settings = {"r": 3, "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], **settings}
        settings = {"exclude_modules": ["bert.pooler.dense"], **settings}
        return get_peft_model(BertForSequenceClassification(config), LoraConfig(**settings))

    return make


@pytest.fixture
def trained_bert(make_bert: Callable[..., Any]) -> Any:
    """A tiny BERT whose LoRA already does something."""
    model = make_bert(r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    """make_llama(blocks=2, **LoraConfig settings): a tiny random Llama with LoRA on all of its linears but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, blocks: int = 2, **settings: Any) -> Any:
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        settings = {"r": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings}
        return get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings))

    return make


TINY: dict[str, dict[str, Any]] = {
    "Albert": {
        "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "classifier_dropout_prob": 0.0,
    },
    "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    "Bert": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "GPT2": {
        "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
}  # fmt: skip


@pytest.fixture
def make_tiny() -> Callable[..., Any]:
    """make_tiny("BertForX", **config): a tiny random model of this class in transformers, with LoRA on all linears."""
    import transformers
    from peft import LoraConfig, get_peft_model

    def make(name: str, **config: Any) -> Any:
        torch.manual_seed(3)
        kind = next(kind for kind in TINY if name.startswith(kind))
        made = getattr(transformers, f"{kind}Config")(**{"vocab_size": 40, "pad_token_id": 0, **TINY[kind], **config})
        made.decoder_start_token_id = 0
        lora = LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=kind == "GPT2")
        return get_peft_model(getattr(transformers, name)(made), lora)

    return make


@pytest.fixture
def checkpoint_activations() -> Callable[[Any, bool], None]:
    """checkpoint_activations(model, reentrant): gradient checkpointing, under the name this transformers has for it."""

    def enable(model: Any, reentrant: bool) -> None:
        base = model.get_base_model()
        switch = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        switch({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    return enable


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """A batch of four rows of six tokens; the last two are padded to four and three."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(3, 40, (4, 6), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, 4:] = 0
    attention_mask[3, 3:] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@pytest.fixture
def net_batch() -> Callable[[int], tuple[Tensor, Tensor]]:
    """net_batch(step): inputs (5, 8) and targets (5, 6) of `Net` at this step."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        return torch.randn(5, WIDTHS[0], generator=generator), torch.randn(5, WIDTHS[-1], generator=generator)

    return batch


@pytest.fixture
def train_net(net_batch: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[..., list[dict[str, Any]]]:
    """train_net(model, optimizer, allocator, steps): the hand-written loop of the README; returns the adjustments."""

    def train(model: Any, optimizer: Any, allocator: Any, steps: int, first: int = 1) -> list[dict[str, Any]]:
        model.train()
        records = []
        for step in range(first, first + steps):
            x, y = net_batch(step)
            (model(x.to(next(model.parameters()).dtype)) - y).square().mean().backward()
            allocator.before_step()
            optimizer.step()
            optimizer.zero_grad()
            record = allocator.after_step()
            if record is not None:
                records.append(record)
        return records

    return train

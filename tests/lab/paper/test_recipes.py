"""The 14 training rows of Tables 7, 8 and 9: their numbers, their parameter counts, and a dry run of each.

Sizes come from configurations alone: full-size models on the meta device, and tiny random models of the same
architecture with stub data.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    DebertaV2Config,
    LlamaConfig,
    PretrainedConfig,
)

from pedyra.app.models.base import load_tokenizer
from pedyra.app.models.lora import lora_config
from pedyra.app.recipe import load_recipe
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.runs.plan import plan_run
from pedyra.app.tasks.test_sets import load_test_sets
from pedyra.lab.paper.item import RECIPES, recipe

# Tables 7 to 9: learning rate, batch, epochs, gamma, t_i, Delta_T, t_f, k; training rows; the rank of section E.
ROWS: dict[str, tuple[float, int, int, float, int, int, int, int, int, int]] = {
    "mnli": (5e-4, 32, 7, 0.1, 3000, 1000, 65000, 12, 392_702, 8),
    "rte": (1.2e-3, 32, 50, 0.3, 300, 100, 2600, 12, 2_490, 8),
    "qnli": (9e-4, 32, 5, 0.1, 1000, 500, 10000, 12, 104_743, 8),
    "mrpc": (1e-3, 32, 30, 0.1, 600, 150, 1100, 12, 3_668, 8),
    "qqp": (6e-4, 32, 9, 0.1, 5000, 1000, 80000, 12, 363_846, 8),
    "sst2": (8e-4, 32, 24, 0.1, 1000, 1000, 25000, 12, 67_349, 8),
    "cola": (1e-3, 32, 35, 0.1, 700, 100, 7000, 12, 8_551, 8),
    "stsb": (2.2e-3, 32, 25, 0.3, 800, 200, 1500, 12, 5_749, 8),
    "llama2_metamath": (2e-4, 16, 5, 0.1, 2000, 1000, 11250, 12, 100_000, 4),
    "llama2_python": (2e-4, 16, 5, 0.1, 2000, 1000, 12765, 12, 104_848, 4),
    "llama3_metamath": (5e-5, 16, 5, 0.1, 2000, 1000, 11250, 12, 100_000, 4),
    "llama3_python": (1e-4, 16, 5, 0.1, 2000, 1000, 12765, 12, 104_848, 4),
    "xsum": (2e-4, 24, 25, 0.1, 6000, 1500, 180000, 12, 204_045, 4),
    "squad_v2": (1.2e-3, 16, 25, 0.1, 5000, 1000, 190000, 12, 131_754, 4),
}

# Adjustments between t_i and T - t_f, worked out by hand: (steps - t_f - t_i) / Delta_T, the last one not at T - t_f.
ADJUSTMENTS = {
    **{"mnli": 17, "rte": 9, "qnli": 10, "mrpc": 11, "qqp": 17, "sst2": 24, "cola": 16, "stsb": 10},
    **{"llama2_metamath": 17, "llama2_python": 17, "llama3_metamath": 17, "llama3_python": 17},
    **{"xsum": 17, "squad_v2": 10},
}

TEXT = "the plot is good. is it worth it?"
STUBS: dict[str, dict[str, Any]] = {
    "classification": {"sentence": TEXT},
    "pairs": dict.fromkeys(
        ("sentence1", "sentence2", "question1", "question2", "premise", "hypothesis", "question", "sentence"), TEXT
    ),
    "regression": {"sentence1": TEXT, "sentence2": TEXT, "label": 1.5},
    "causal_lm": dict.fromkeys(("query", "response", "question", "answer", "instruction", "output"), TEXT),
    "seq2seq": {"document": TEXT, "summary": "good"},
    "question_answering": {
        **{"question": "what is good?", "context": TEXT},
        **{"answers": {"text": ["the plot"], "answer_start": [0]}},
    },
}


def steps(name: str) -> int:
    _, batch, epochs, *_, rows, _ = ROWS[name]
    return math.ceil(rows / batch) * epochs


def test_each_training_row_of_the_paper_has_one_recipe():
    own = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("small_", "smoke_"))}
    assert own == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_has_every_number_of_its_row(name):
    one, rate, rank = recipe(name), ROWS[name], recipe(name).method.settings
    training = [one.training[k] for k in ("learning_rate", "per_device_train_batch_size", "num_train_epochs")]
    schedule = [rank[k] for k in ("orth_weight", "initial_warmup", "interval", "final_warmup", "moves")]
    assert (*training, *schedule) == rate[:8]
    assert one.lora.r == rate[9] and one.method.name == "pedyra"


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("llama")])
def test_table_8s_final_phases_tell_the_number_of_rows(name):
    # 12765 = 32765 - 20000 and 11250 = 31250 - 20000, exactly.
    assert steps(name) - ROWS[name][6] == 20_000


_DEBERTA: dict[str, Any] = {
    **dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=128_100),
    **dict(relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"], share_att_key=True),
    **dict(norm_rel_ebd="layer_norm", max_relative_positions=-1, position_biased_input=False, type_vocab_size=0),
}
_BART: dict[str, Any] = {
    **dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096),
    **dict(encoder_attention_heads=16, decoder_attention_heads=16, vocab_size=50_265),
}
_LLAMA: dict[str, Any] = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
FULL_SIZE: dict[str, tuple[PretrainedConfig, Any]] = {
    "deberta": (DebertaV2Config(**_DEBERTA), AutoModelForSequenceClassification),
    "bart": (BartConfig(**_BART), AutoModelForSeq2SeqLM),
    "llama2": (LlamaConfig(**_LLAMA, intermediate_size=11_008, vocab_size=32_000), AutoModelForCausalLM),
    "llama3": (
        LlamaConfig(**_LLAMA, intermediate_size=14_336, vocab_size=128_256, num_key_value_heads=8),
        AutoModelForCausalLM,
    ),
}


def counts(config_name: str, recipe_name: str) -> tuple[int, int, int]:
    """Adapted layers, parameters of their factors, and parameters of the base model."""
    config, auto = FULL_SIZE[config_name]
    one = recipe(recipe_name)
    with torch.device("meta"):
        base: Any = auto.from_config(config)
        total = base.num_parameters()
        model = get_peft_model(base, lora_config(one.lora, one.data.kind, base), low_cpu_mem_usage=True)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return len(factors) // 2, sum(factor.numel() for factor in factors), total


def test_deberta_at_rank_8_has_72_layers_and_1_33_million_parameters():
    layers, parameters, total = counts("deberta", "sst2")
    assert layers == 72 and round(parameters / 1e6, 2) == 1.33  # Table 10
    assert 183e6 < total < 186e6  # the model itself: 184M


def test_bart_large_at_rank_4_has_2_06_million_parameters_in_units_of_2_to_the_20():
    layers, parameters, _ = counts("bart", "xsum")
    assert (layers, parameters) == (192, 2_162_688)
    assert round(parameters / 2**20, 2) == 2.06  # Table 4
    assert round(1.5 * parameters / 2**20, 2) == 3.09  # AdaLoRA starts at 1.5 times the rank


@pytest.mark.parametrize(
    ("config", "name", "share"), [("llama2", "llama2_python", 0.15), ("llama3", "llama3_python", 0.13)]
)
def test_llama_at_rank_4_has_the_share_of_table_3(config, name, share):
    layers, parameters, total = counts(config, name)
    assert layers == 224 and round(100 * parameters / total, 2) == share


TINY = {
    **{"deberta": ("tiny-deberta", 2 * 6), "bart": ("tiny-bart", 2 * (6 + 10)), "lama": ("tiny-llama", 2 * 7)},
    **{"minilm": ("tiny-bert", 2 * 6 + 1), "t5": ("tiny-t5", 2 * (6 + 10)), "Qwen": ("tiny-llama", 2 * 7)},
}
"""Part of a model's name -> two layers of its architecture (of each side), and how many linear layers these have."""
SMALL = sorted(path.stem for path in RECIPES.glob("small_*.yaml"))


@pytest.mark.parametrize("name", [*ROWS, *SMALL])
def test_dry_run_on_a_tiny_model_of_the_same_architecture(name, tmp_path):
    one = recipe(name)
    model, layers = next(tiny for key, tiny in TINY.items() if key in one.model.name)
    file = tmp_path / "rows.jsonl"
    rows = [{"label": index % 2, **STUBS[one.data.kind]} for index in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *(f"model.name={model}", "model.dtype=float32", "training.bf16=false"),
        *(f"data.source={file}", "data.config=null", "data.validation=null"),
        *("data.train_rows=null", "data.validation_fraction=0.2", "generate={}", f"output_dir={tmp_path / 'run'}"),
        f"training.max_steps={steps(name) if name in ROWS else one.training['max_steps']}",
    ]
    plan, *planned = plan_run(load_recipe(RECIPES / f"{name}.yaml", overrides))
    adjustments = plan["adjustments"]
    assert adjustments == ADJUSTMENTS[name] if name in ROWS else 4 <= adjustments <= 30
    layers -= name == "small_squad_v2"  # a BERT without its pooler
    assert [layer["rank"] for layer in planned] == [one.lora.r] * layers


def test_functions_are_asked_for_alike_at_every_scale(tmp_path):
    file = tmp_path / "problems.jsonl"
    row = {
        "task_id": "T/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "canonical_solution": " pass",
        "test": "",
    }
    file.write_text(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(ModelSection(name="tiny-llama"))
    asked = {}
    for name in ("llama2_python", "llama3_python", "small_code"):
        one = recipe(name)
        for test_set in ("humaneval", "humanevalplus"):
            section = one.generate[test_set].model_copy(update={"source": str(file)})
            (result,) = load_test_sets({test_set: section}, one.data, tokenizer, [], seed=0)
            asked[name, test_set] = (tokenizer.decode(result.prompts[0]), tuple(result.settings.stop or ()))
    prompt, stop = asked["small_code", "humaneval"]
    assert "Complete the function.\n\ndef add(a, b):\n" in prompt and "\ndef " in stop
    assert prompt.endswith("### Response:\ndef add(a, b):\n")
    assert set(asked.values()) == {(prompt, stop)}

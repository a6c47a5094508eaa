"""Every class trains a tiny Llama by one line in a stock Trainer and in TRL's SFTTrainer, leaves a folder that PEFT
loads without pedyra, and, where it can resume, ends with the same bits as a training that was not stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import PreTrainedModel

import pedyra

WHEN: dict[str, Any] = {"interval": 2, "initial_warmup": 1, "final_warmup": 3}
STEPS = 10
CASES: dict[str, tuple[Any, int]] = {
    "PeDyra": (pedyra.PeDyra(**WHEN, moves=4), 4),
    "Prune": (pedyra.Prune(**WHEN, final_rank=4), 6),
    "Expand": (pedyra.Expand(**WHEN, final_rank=4), 2),
    "RandomMoves": (pedyra.RandomMoves(**WHEN, moves=4), 4),
    "Mask": (pedyra.Mask(**WHEN, moves=4), 4),
    "AdaLora": (pedyra.AdaLora(**WHEN, final_rank=4), 6),
    "IncreLora": (pedyra.IncreLora(**WHEN, final_rank=4), 1),
    "TriAdaptLora": (pedyra.TriAdaptLora(**WHEN, final_rank=4), 1),
    "ElaLora": (pedyra.ElaLora(**WHEN), 4),
    "DyLora": (pedyra.DyLora(rank=3), 4),
    "Rasa": (pedyra.Rasa(), 4),
    "Sora": (pedyra.Sora(threshold=0.1), 4),
    "Eva": (pedyra.Eva(), 4),
    "Gora": (pedyra.Gora(), 4),
    "AutoLora": (pedyra.AutoLora(search_steps=2), 8),
    "LoraPlus": (pedyra.LoraPlus(ratio=4), 4),
}
"""Class -> method, and the r of the LoRA that it begins with."""
ROWS: Any = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 40, (40, 8), generator=torch.Generator().manual_seed(0)).tolist()
]


def test_every_class_is_here():
    others = {
        "adapt",
        "fit",
        "prove",
        "RankAllocator",
        "Fit",
        "Proof",
        "RankResult",
        "attach",
        "detach",
        "export_adapter",
    }
    assert set(CASES) == set(pedyra.__all__) - others


def llama() -> PreTrainedModel:
    torch.manual_seed(3)
    sizes: Any = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=1, max_position_embeddings=16))


def model_of(r: int) -> Any:
    lora = LoraConfig(r=r, lora_alpha=4 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(llama(), lora)


def arguments(out: Path, kind: Any = TrainingArguments, **more: Any) -> Any:
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-2, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=5,
    )  # fmt: skip
    return kind(str(out), **{**settings, **more})


def trainer_of(case: str, out: Path, **more: Any) -> Trainer:
    method, r = CASES[case]
    trainer = Trainer(model_of(r), arguments(out, **more), train_dataset=ROWS)
    trainer.remove_callback(PrinterCallback)
    pedyra.adapt(trainer, method)
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([row["input_ids"] for row in ROWS[:4]])).logits


WITHOUT_PEDYRA = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
folders, errors = sys.argv[1:], []
for folder in folders:
    kept = load_file(f"{folder}/kept.safetensors")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{folder}/base"), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(kept["ids"]).logits, kept["logits"], rtol=1e-4, atol=1e-5)
assert "pedyra" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every class, trained by a stock Trainer and saved."""
    saved = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        trainer = trainer_of(case, folder / "run")
        model: Any = trainer.model
        before = logits(model)
        trainer.train()
        after = logits(model)
        assert after.isfinite().all() and (after - before).abs().max() > 1e-3, case
        model.save_pretrained(folder / "out")
        llama().save_pretrained(folder / "out" / "base")
        ids = torch.tensor([row["input_ids"] for row in ROWS[:4]])
        save_file({"ids": ids, "logits": after}, folder / "out" / "kept.safetensors")
        saved[case] = folder / "out"
    return saved


def test_each_folder_loads_without_pedyra_and_gives_the_same(folders: dict[str, Path]):
    paths = [str(path) for path in folders.values()]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEDYRA, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("case", CASES)
def test_a_class_trains_in_an_sft_trainer(case: str, tmp_path: Path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    method, r = CASES[case]
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(40)}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>", unk_token="<0>")
    trainer = trl.SFTTrainer(
        model_of(r), arguments(tmp_path, trl.SFTConfig, bf16=False),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    before = logits(trainer.model)
    pedyra.adapt(trainer, method)
    trainer.train()
    assert (logits(trainer.model) - before).abs().max() > 1e-3
    trainer.model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("case", CASES)
def test_a_resume_ends_with_the_same_bits(case: str, tmp_path: Path):
    whole = trainer_of(case, tmp_path, save_strategy="steps", save_steps=6)
    whole.train()
    resumed = trainer_of(case, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same_bits(logits(resumed.model), logits(whole.model))


class ByHand(TrainerCallback):
    """What PEFT's docs ask of a user of AdaLoRA."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


def test_pefts_adalora_is_masked_as_by_a_callback_of_ones_own(tmp_path: Path):
    masks = []
    for by_hand in (True, False):
        config = AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=3, deltaT=2, total_step=STEPS, lora_alpha=16,
            target_modules="all-linear", task_type="CAUSAL_LM", orth_reg_weight=0.1,
        )  # fmt: skip
        model: Any = get_peft_model(llama(), config)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS)
        trainer.remove_callback(PrinterCallback)
        if by_hand:
            trainer.add_callback(ByHand())
        else:
            config.tinit = config.tfinal = config.deltaT = 5  # the method says when
            pedyra.adapt(trainer, pedyra.AdaLora(**WHEN))
        trainer.train()
        masks.append({name: (E != 0).tolist() for name, E in model.named_parameters() if "lora_E" in name})
    assert masks[0] == masks[1] and not all(all(map(any, mask)) for mask in masks[0].values())


def test_a_setting_of_pefts_adalora_is_its_configs(tmp_path: Path):
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=STEPS, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(get_peft_model(llama(), config), arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(ValueError, match="final_rank is 3, but on an adapter of PEFT's AdaLoraConfig it is the config"):
        pedyra.adapt(trainer, pedyra.AdaLora(final_rank=3))

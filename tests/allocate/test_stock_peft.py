"""Every checkpoint is an ordinary LoRA adapter: stock PEFT loads it, without pedyra installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "paper": ({"paper": True}, {}),
    "DoRA": ({}, {"use_dora": True}),
    "PiSSA": ({}, {"init_lora_weights": "pissa"}),
    "PiSSA, SVD start": ({"start": "svd"}, {"init_lora_weights": "pissa"}),
    "rsLoRA": ({}, {"use_rslora": True, "lora_alpha": 4}),
    "rank 0": ({"min_rank": 0, "moves": 7}, {}),
    "alpha and rank patterns": ({}, {"alpha_pattern": {"query": 3}, "rank_pattern": {"value": 5}}),
}

STOCK_PEFT = """
import json, sys
sys.modules["pedyra"] = None
try:
    import pedyra
except ImportError:
    pass
else:
    raise SystemExit("pedyra can be imported: the test would prove nothing")
import torch
torch.set_num_threads(1)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

differences = {}
base, tokens, *folders = sys.argv[1:]
for folder in folders:
    model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), folder).eval()
    with torch.no_grad():
        logits = model(**load_file(tokens)).logits
    differences[folder] = (logits - load_file(folder + "/expected_logits")["logits"]).abs().max().item()
print(json.dumps(differences))
"""


@pytest.mark.slow
def test_every_adapter_loads_in_stock_peft_without_pedyra(make_trainer, make_bert, quick, logits, tokens, tmp_path):
    """Same logits to 1e-5 from the checkpoints of every variant, with ranks in between, and from save_pretrained."""
    torch.manual_seed(3)
    make_bert().unload().save_pretrained(tmp_path / "base")
    save_file(tokens, tmp_path / "tokens")
    folders = []

    class KeepLogits(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            keep(kwargs["model"], Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def keep(model: Any, folder: Path) -> None:
        save_file({"logits": logits(model)}, folder / "expected_logits")
        folders.append(str(folder))

    start = logits(make_bert())
    for name, (rank, lora) in VARIANTS.items():
        trainer, callback = make_trainer(tmp_path / name, quick(**rank), lora=lora, save_strategy="steps", save_steps=4)
        trainer.add_callback(KeepLogits)
        trainer.train()
        trainer.model.save_pretrained(tmp_path / name / "adapter")
        keep(trainer.model, tmp_path / name / "adapter")
        assert len(set(callback.allocator.ranks.values())) > 1, name
        assert (logits(trainer.model) - start).abs().max() > 1e-2, (
            f"{name} has learned nothing: nothing would be proved"
        )
        if name == "rank 0":
            assert 0 in callback.allocator.ranks.values()

    command = [sys.executable, "-c", STOCK_PEFT, str(tmp_path / "base"), str(tmp_path / "tokens"), *folders]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    differences = json.loads(found.stdout.splitlines()[-1])
    assert len(differences) == 4 * len(VARIANTS)
    assert max(differences.values()) < 1e-5, differences

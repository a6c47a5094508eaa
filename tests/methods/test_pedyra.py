"""PE-DyRA by name: its settings, and on top of DoRA, PiSSA and QLoRA (Tables 11 and 12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pedyra import PeDyra
from pedyra.methods.names import make_method


def test_the_section_gives_the_settings_of_pedyra(prepare: Any):
    method = prepare("pedyra", settings={"alpha": 0.3}).work.ranks
    assert method.to_dict() == PeDyra(alpha=0.3, interval=2, initial_warmup=2, final_warmup=3).to_dict()


@pytest.mark.parametrize(("settings", "seed"), [({}, 5), ({"seed": 1}, 1)])
def test_new_triples_have_the_seed_of_the_run_where_the_method_has_none(settings: dict[str, int], seed: int):
    assert make_method("pedyra", settings, seed=5).seed == seed


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize(
    "host", [{"lora": {"use_dora": True}}, {"lora": {"init": "pissa"}}, {"model": {"quantization": "nf4"}}]
)
def test_it_goes_on_top_of_dora_pissa_and_qlora(prepare: Any, make_base: Any, tmp_path: Path, host: dict[str, Any]):
    if "model" in host:
        pytest.importorskip("bitsandbytes")
    run = prepare("pedyra", settings={"moves": 6}, **host)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        untouched = base.eval()(**run.inputs()).logits
    torch.testing.assert_close(run.logits(), untouched, rtol=1e-3, atol=1e-4)  # attaching changes nothing
    run.train()
    ranks = run.allocator.ranks
    assert len(set(ranks.values())) > 1
    assert any(record["pruned"] for record in run.allocator.history)
    expected = run.logits()
    assert (expected - untouched).abs().max() > 1e-3
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()(**run.inputs()).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-3)

"""PE-DyRA by name: the two presets, and on top of DoRA, PiSSA and QLoRA (Tables 11 and 12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pedyra.config import RankConfig

MOVING = {"rank": {"moves": 6, "init": "orthogonal", "expand": "importance"}}


def test_the_presets(prepare: Any):
    assert prepare("pedyra").ranks.config == RankConfig(interval=4, initial_warmup=2, final_warmup=3)
    assert prepare("pedyra-paper").ranks.config == RankConfig.paper(interval=2, initial_warmup=2, final_warmup=3)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize("method", ["pedyra", "pedyra-paper"])
@pytest.mark.parametrize(
    "host", [{"lora": {"use_dora": True}}, {"lora": {"init": "pissa"}}, {"model": {"quantization": "nf4"}}]
)
def test_it_goes_on_top_of_dora_pissa_and_qlora(
    prepare: Any, make_base: Any, tmp_path: Path, method: str, host: dict[str, Any]
):
    if "model" in host:
        pytest.importorskip("bitsandbytes")
    run = prepare(method, **MOVING, **host)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        untouched = base.eval()(**run.inputs()).logits
    torch.testing.assert_close(run.logits(), untouched, rtol=1e-3, atol=1e-4)  # attaching changes nothing
    run.train()
    ranks = run.allocator.ranks
    assert len(set(ranks.values())) > 1 and run.allocator.history[0]["pruned"]
    expected = run.logits()
    assert (expected - untouched).abs().max() > 1e-3
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()(**run.inputs()).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-3)


def test_it_has_no_settings_beside_rank(prepare: Any):
    with pytest.raises(ValueError, match="method_settings.moves: method pedyra has no settings of its own"):
        prepare("pedyra", method_settings={"moves": 3})

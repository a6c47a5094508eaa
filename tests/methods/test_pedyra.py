"""PE-DyRA by name: the two presets, and on top of DoRA, PiSSA and QLoRA (Tables 11 and 12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pedyra.config import RankConfig

NARROW: dict[str, Any] = {
    "rank": {"target_rank": 2, "initial_warmup": 2, "interval": 10, "final_warmup": 3},
    "training": {"max_steps": 20},
}


def test_the_presets(prepare: Any):
    assert prepare("pedyra").ranks.config == RankConfig(interval=10, initial_warmup=1, final_warmup=0, target_rank=2)
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
    if method == "pedyra" and host == {"lora": {"init": "pissa"}}:
        with pytest.raises(ValueError, match="began as a part of the weight"):
            prepare(method, **NARROW, **host).train()
        return
    run = prepare(method, **(NARROW if method == "pedyra" else {"rank": {"moves": 6}}), **host)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        untouched = base.eval()(**run.inputs()).logits
    torch.testing.assert_close(run.logits(), untouched, rtol=1e-3, atol=1e-4)  # attaching changes nothing
    run.train()
    ranks = run.allocator.ranks
    assert len(set(ranks.values())) > 1 and any(record["pruned"] for record in run.allocator.history)
    expected = run.logits()
    assert (expected - untouched).abs().max() > 1e-3
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()(**run.inputs()).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-3)

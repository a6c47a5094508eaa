"""PE-DyRA by name: the two presets, and on top of DoRA, PiSSA and QLoRA (Tables 11 and 12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pedyra.config import RankConfig
from pedyra.methods.pedyra.settings import Settings

MOVING: dict[str, Any] = {
    "rank": {"moves": 6, "interval": 4},
    "method_settings": {"certainty": 0.0, "margin": 1e-3, "reassignment": 0},
    "training": {"max_steps": 20},
}


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
    run = prepare(method, **(MOVING if method == "pedyra" else {"rank": {"moves": 6}}), **host)
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


def test_what_benches_vary_is_no_rank_setting(prepare: Any):
    assert prepare("pedyra", method_settings={"patience": 3}).ranks.method.settings == Settings(patience=3)
    with pytest.raises(ValueError, match="rank.patience was removed: it is method_settings.patience of method pedyra"):
        prepare("pedyra", rank={"patience": 3})
    with pytest.raises(ValueError, match="method_settings.patience is no setting of method pedyra-paper; it has none"):
        prepare("pedyra-paper", method_settings={"patience": 3})

"""The smaller adapter on disk, against the model with its directions projected out, loaded by stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from pedyra.fitting.calibration import calibrate, truncated
from pedyra.fitting.cut import RECORD, cut_folder, cut_model, singular_basis
from pedyra.fitting.fit import fit_adapter
from pedyra.lora.attach import attach
from pedyra.lora.folder import read_lora


def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, 8, generator=generator), "y": torch.randn(6, 6, generator=generator)} for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, [2, 0, 4]),
        ({"use_rslora": True}, [1, 3, 2]),
        ({"rank_pattern": {"1": 2}, "alpha_pattern": {"2": 20}}, [3, 2, 0]),
        ({"use_dora": True}, [1, 2, 3]),
    ],
    ids=["plain", "rslora", "patterns", "dora"],
)
def test_stock_peft_loads_what_the_projection_gives(make_net: Any, tmp_path: Path, settings: Any, ranks: list[int]):
    model = make_net(trained=True, **settings)
    found = calibrate(model, batches(3), loss=loss)
    wanted = dict(zip(found.layers, ranks, strict=True))
    x = batches(1, seed=1)[0]["x"]
    with truncated(model, found, wanted):
        expected = model(x)
    out = cut_model(model, found, wanted, tmp_path / "out", {"kept": sum(ranks)})
    base: Any = make_net(**settings).unload()
    loaded = PeftModel.from_pretrained(base, str(out)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    tensors = load_file(out / "adapter_model.safetensors")
    assert [tensors[k].shape[0] for k in sorted(tensors) if "lora_A" in k] == [rank for rank in ranks if rank]
    assert json.loads((out / RECORD).read_text()) == {"kept": sum(ranks)}


def test_a_layer_that_keeps_all_is_the_same_to_the_last_bit(make_net: Any, tmp_path: Path):
    model = make_net(trained=True)
    found = calibrate(model, batches(3), loss=loss)
    out = cut_model(model, found, dict(zip(found.layers, [4, 1, 4], strict=True)), tmp_path / "out", {})
    model.save_pretrained(tmp_path / "before")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "before", out))
    assert all(torch.equal(before[key], after[key]) for key in before if ".0." in key or ".2." in key)


def test_without_data_the_basis_is_that_of_the_singular_values(make_net: Any, tmp_path: Path):
    model = make_net(trained=True)
    model.save_pretrained(tmp_path / "adapter")
    lora = read_lora(tmp_path / "adapter")
    bases = {layer.name: singular_basis(*(lora.tensors[layer.keys[s]] for s in "AB")) for layer in lora.layers}
    out = cut_folder(lora, bases, dict.fromkeys(bases, 2), tmp_path / "out", {})
    for before, after in zip(lora.layers, (cut := read_lora(out)).layers, strict=True):
        W, V = (f.tensors[each.keys["B"]] @ f.tensors[each.keys["A"]] for f, each in ((lora, before), (cut, after)))
        values = torch.linalg.svdvals(W)
        torch.testing.assert_close(bases[before.name].values.float(), values[:4], rtol=1e-3, atol=1e-4)
        # Eckart-Young: no other update of rank 2 is nearer.
        torch.testing.assert_close((W - V).norm(), values[2:].norm(), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_written_is_refused_before_anything_is(make_net: Any, tmp_path: Path):
    model = make_net(trained=True)
    found = calibrate(model, batches(3), loss=loss)
    every = {name: layer.rank for name, layer in found.layers.items()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full already holds files; choose another folder, or remove it"):
        cut_model(model, found, every, tmp_path / "full", {})
    with pytest.raises(ValueError, match="no direction is left in any layer, and PEFT knows no adapter of none"):
        cut_model(model, found, dict.fromkeys(every, 0), tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


@pytest.fixture
def half_used(make_net: Any) -> Any:
    """A LoRA of rank 4 in each of three layers, of which one direction in one layer does all the work."""
    model = make_net(trained=True)
    with torch.no_grad():
        for index, layer in enumerate(model.get_base_model().layers):
            layer.lora_B["default"].weight[:, 1 if index == 1 else 0 :] = 0
        model.get_base_model().layers[1].lora_B["default"].weight *= 5
    return model


def made_by(model: Any, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches whose targets are the model's own outputs, with noise."""
    found = batches(count, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return [{"x": b["x"], "y": model(b["x"]) + 0.3 * torch.randn(6, 6, generator=generator)} for b in found]


def test_fit_finds_the_one_direction_that_works_and_proves_it(half_used: Any):
    rows = [made_by(half_used, 40, seed) for seed in (1, 2, 3)]
    fit = fit_adapter(half_used, *rows, loss=loss)
    assert list(fit.ranks.values()) == [0, 1, 0]
    assert fit.proof is not None and abs(fit.proof) < 1e-6 and fit.within_tolerance
    assert fit.verdict == "flat" and fit.row()["kept"] == 1 and fit.row()["of"] == 12
    chosen = [row for row in fit.curve_rows() if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["parameters"] == fit.row()["parameters"] == 12 + 6


def test_a_size_that_is_asked_for_is_taken_and_proved(half_used: Any):
    rows = [made_by(half_used, 20, seed) for seed in (1, 2, 3)]
    fit = fit_adapter(half_used, *rows, parameters=40, loss=loss)
    assert fit.chosen.parameters <= 40 and not fit.within_tolerance and fit.proof is not None


def test_an_adapter_that_has_learned_nothing_keeps_everything(make_net: Any):
    model = make_net()  # B = 0
    rows = [made_by(model, 20, seed) for seed in (1, 2, 3)]
    fit = fit_adapter(model, *rows, loss=loss)
    assert fit.ranks == {name: 4 for name in fit.ranks} and fit.verdict == "unknown" and fit.proof is None
    assert fit.words.startswith("unknown: the adapter has not lowered the loss")


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1])
def test_a_tolerance_is_a_part(half_used: Any, tolerance: float):
    rows = made_by(half_used, 3, 1)
    with pytest.raises(ValueError, match=r"it is a part of what was won, in \(0, 1\), e.g. 0.01"):
        fit_adapter(half_used, rows, rows, rows, tolerance=tolerance, loss=loss)


def test_a_live_pissa_is_told_apart_from_its_folder(make_net: Any, tmp_path: Path):
    """On disk it has the start beside it, twice the rank; the folder is what can be cut."""
    model = make_net(init_lora_weights="pissa")
    attach(model)
    found = calibrate(model, batches(3), loss=loss)
    with pytest.raises(ValueError, match="0 has rank 8 on disk and was measured at rank 4.*load the folder"):
        cut_model(model, found, dict.fromkeys(found.layers, 2), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()

"""The smaller adapter on disk, against the model with its directions projected out, loaded by stock PEFT."""

# pyright: reportOptionalMemberAccess=false
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import same_bits
from peft import PeftModel
from peft.helpers import DoraCaching
from safetensors.torch import load_file
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.export.destinations import Destination, destination
from pedyra.fitting.balance import Balance
from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.cut import CURVE, FIT_RECORD, check_out, cut_factors, cut_live, cut_to, write_cut
from pedyra.fitting.fit import NotWithin, Rows, fit_batches
from pedyra.fitting.heldout import Answers, HeldOut
from pedyra.fitting.judge import DivergenceJudge, Judge
from pedyra.fitting.logits import Logits
from pedyra.fitting.request import FitRequest
from pedyra.fitting.result import Fit
from pedyra.lora.attach import attach
from pedyra.lora.folder import read_lora


def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, 8, generator=generator), "y": torch.randn(6, 6, generator=generator)} for _ in range(count)
    ]


def fitted(model: Any, rows: list[list[dict[str, Tensor]]], **wanted: Any) -> Fit:
    calibration, held = rows
    return fit_batches(Judge(model, loss), Rows(calibration=calibration, heldout=held), FitRequest(**wanted))


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return read_lora(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT's own, of a bias in lora_B
@pytest.mark.parametrize("live", [False, True], ids=["on disk", "live"])
@pytest.mark.parametrize("attached", [False, True], ids=["linear", "attached"])
@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, [2, 0, 4]),
        ({"use_rslora": True}, [1, 3, 2]),
        ({"rank_pattern": {"1": 2}, "alpha_pattern": {"2": 20}}, [3, 2, 0]),
        ({"use_dora": True}, [1, 2, 3]),
        ({"lora_bias": True}, [1, 2, 4]),
    ],
    ids=["plain", "rslora", "patterns", "dora", "bias"],
)
def test_stock_peft_loads_what_was_judged(
    make_net: Any, tmp_path: Path, settings: Any, ranks: list[int], attached: bool, live: bool
):
    """The folder that is written and the one that PEFT saves of the cut live model hold the same files."""
    model = make_net(trained=True, **settings).eval()
    if attached:
        attach(model)
    found = calibrate(Judge(model, loss), batches(3))
    wanted = dict(zip(found.layers, ranks, strict=True))
    x = batches(1, seed=1)[0]["x"]
    factors = cut_factors(model, found, wanted)
    with torch.no_grad(), cut_to(model, factors):
        expected = model(x)
    out = tmp_path / "out"
    write_cut(saved(model, tmp_path / "whole"), factors, out, {"kept": sum(ranks)}, beside={CURVE: '{"share": 1.0}'})
    if live:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        cut_live(model, factors)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        shapes = {name: module.lora_A["default"].weight.shape[0] for name, module in lora_layers(model).items()}
        assert shapes == {name: max(1, rank) for name, rank in wanted.items()}
        assert {name for name, p in model.named_parameters() if p.requires_grad} <= {*trained}
        model.save_pretrained(tmp_path / "live")
        assert_the_same_folder(tmp_path / "live", out)
    base: Any = make_net(**settings).unload()
    loaded = PeftModel.from_pretrained(base, str(out)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    tensors = tensors_of(out)
    assert [tensors[k].shape[0] for k in sorted(tensors) if "lora_A" in k] == [max(1, rank) for rank in ranks]
    assert json.loads((out / FIT_RECORD).read_text()) == {"kept": sum(ranks)}
    assert json.loads((out / CURVE).read_text()) == {"share": 1.0}


def assert_the_same_folder(one: Path, other: Path) -> None:
    """The same numbers were computed once, so the files hold the same bits."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and all(same_bits(first[key], second[key]) for key in first)
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (one, other)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_a_layer_that_keeps_all_is_the_same_to_the_last_bit(make_net: Any, tmp_path: Path):
    model = make_net(trained=True)
    found = replace(calibrate(Judge(model, loss), batches(3)), repairs=False)  # which would change all layers
    lora = saved(model, tmp_path / "before")
    write_cut(lora, cut_factors(model, found, dict(zip(found.layers, [4, 1, 4], strict=True))), tmp_path / "out", {})
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "out")
    assert all(same_bits(before[key], after[key]) for key in before if ".0." in key or ".2." in key)


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_kept_makes_up_for_what_is_removed_where_it_can(make_net: Any, shared: bool):
    """The loss is the squared distance from what the whole adapter says, with noise. Where a direction that goes is
    nearly one that stays, most of it comes back; where none is, little is added."""
    model, rows = make_net(trained=True).eval(), batches(64)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            B *= 0.1  # so that the network is nearly linear in it
            if shared:
                A[2:], B[:, 2:] = A[:2] + 0.1 * A[2:], B[:, :2] + 0.1 * B[:, 2:]
    with torch.no_grad():
        said = [model(row["x"]) for row in rows]
    noise = torch.Generator().manual_seed(3)
    targets = {id(row): each + torch.randn(each.shape, generator=noise) for row, each in zip(rows, said, strict=True)}

    def loss(model: Any, row: Any) -> Tensor:
        return (model(row["x"]) - targets[id(row)]).square().sum(1).mean() / 2

    found = calibrate(Judge(model, loss), rows)
    eye = torch.eye(4).double()  # as they are stored, so that what goes and what stays is known
    layers = {
        name: replace(
            layer,
            basis=Balance(eye, eye, layer.basis.values),
            products=layer.basis.inverse @ layer.products @ layer.basis.T,
        )
        for name, layer in found.layers.items()
    }
    ranks, found = dict.fromkeys(layers, 2), replace(found, layers=layers)

    def distance(calibration: Any) -> float:
        with torch.no_grad(), cut_to(model, cut_factors(model, calibration, ranks)):
            pairs = zip(rows, said, strict=True)
            return float(torch.stack([(model(row["x"]) - each).square().mean() for row, each in pairs]).mean())

    assert distance(found) < (0.3 if shared else 1.3) * distance(replace(found, repairs=False))


def test_a_place_without_permission_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def access(path: Any, mode: int) -> bool:
        return Path(path) != tmp_path

    monkeypatch.setattr("os.access", access)  # the superuser may write anywhere
    (tmp_path / "inside").mkdir()
    check_out(tmp_path / "inside" / "new")
    for out in (tmp_path / "inside", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match=f"no permission in {tmp_path}"):
            check_out(out)


@pytest.fixture
def two_used(make_net: Any) -> Any:
    """A LoRA of rank 4 in each of three layers, of which two directions in every layer do all the work."""
    model = make_net(trained=True)
    with torch.no_grad():
        for layer in model.get_base_model().layers:
            layer.lora_B["default"].weight[:, 2:] = 0
    return model


def made_by(model: Any, *counts: int, noise: float = 0.3) -> list[list[dict[str, Tensor]]]:
    """Parts of so many batches whose targets are the model's own outputs, with noise."""
    parts = []
    for seed, count in enumerate(counts, 1):
        generator = torch.Generator().manual_seed(seed)
        parts.append(batches(count, seed))
        with torch.no_grad():
            for batch in parts[-1]:
                batch["y"] = model(batch["x"]) + noise * torch.randn(6, 6, generator=generator)
    return parts


def test_fit_finds_the_directions_that_work_and_proves_it(two_used: Any):
    fit = fitted(two_used, made_by(two_used, 40, 60))
    assert [*fit.ranks.values()] == [2, 2, 2] and fit.chosen.accepted and fit.chosen.proof is not None
    assert abs(fit.chosen.proof.rise.mean) < 1e-6
    assert [(each.rank, each.accepted) for each in fit.curve] == [(4, None), (2, True), (1, False)]
    row = fit.row()
    assert (fit.verdict, row["kept"], row["of"], row["rank"], row["batches"]) == ("flat", 6, 12, 2, 60)
    assert [each["rank"] for each in fit.curve_rows() if each["chosen"]] == [2]
    assert f"{row['parameters']:,} parameters" in str(fit)


def reads_weights_in_evaluation(layer: Any, weights: Any) -> None:
    """Do what a fused kernel does: it calls the slots where there are gradients, else it takes their `weights()`."""
    forward = layer.forward

    def fused(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return forward(x)
        A, B = weights()
        return layer.base_layer(x) + layer.scaling["default"] * (x @ A.T) @ B.T

    layer.forward = fused


@pytest.mark.parametrize("live", [True, False], ids=["reads them anew", "has kept them"])
def test_a_layer_that_is_not_called_in_evaluation_is_cut_or_told(make_net: Any, live: bool):
    """Half of the layers do: what they lose is measured, and no cut of theirs that did nothing costs +0.0000."""
    model = make_net(trained=True)
    rows = made_by(model, 10, 30)
    expected = fitted(model, rows, rank=1).row()["measured_increase"]
    for layer in [*lora_layers(model).values()][:2]:

        def weights(layer: Any = layer) -> list[Tensor]:
            return [slot["default"].weight.detach() for slot in (layer.lora_A, layer.lora_B)]

        kept = weights()
        reads_weights_in_evaluation(layer, weights if live else lambda kept=kept: kept)
    if live:
        assert fitted(model, rows, rank=1).row()["measured_increase"] == pytest.approx(expected, rel=1e-4)
        return
    with pytest.raises(UserError, match=f"{next(iter(lora_layers(model)))} was cut, and nothing read"):
        fitted(model, rows, rank=1)


@pytest.mark.parametrize("key", ["of the mode", "of the version"])
@pytest.mark.parametrize("rank", [None, 1], ids=["several sizes", "one size"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_layer_that_keeps_the_weights_of_another_size_is_told(
    make_net: Any, key: str, rank: int | None, labelled: bool
):
    """It merges once while there are no gradients, or once for each version of its weights: it reads the factors of
    the first size and goes on with them, for the sizes below or for the whole adapter afterwards. Rows without labels
    have no loss that would tell, and the heights of their answers do."""
    model, merged = make_net(trained=True), {}
    rows = made_by(model, 10, 30)
    layer = next(iter(lora_layers(model).values()))
    forward = layer.forward

    def cached(x: Tensor) -> Tensor:
        A, B = (slot["default"] for slot in (layer.lora_A, layer.lora_B))
        if layer.disable_adapters:
            return layer.base_layer(x)
        if torch.is_grad_enabled():
            merged.clear()
            return forward(x)
        version = A.weight._version if key == "of the version" else None
        if version not in merged:
            merged.clear()
            merged[version] = layer.scaling["default"] * B.weight.detach() @ A.weight.detach()
        return layer.base_layer(x) + x @ merged[version].T

    layer.forward = cached

    told = pytest.raises(UserError, match="weights that were computed|weights that it computed")
    if not labelled and rank is not None and key == "of the version":
        told = nullcontext()  # the whole adapter comes between any two batches, so that it is measured truly
    with told:
        if labelled:
            fitted(model, rows, rank=rank, tolerance="99%")
        else:
            judge = DivergenceJudge(model, lambda batch: Logits(model(batch["x"]), torch.arange(6)))
            unlabelled = Rows(calibration=rows[0], heldout=rows[1], unlabelled=True)
            fit_batches(judge, unlabelled, FitRequest(rank=rank, changed="99%"))


def test_norms_that_dora_keeps_are_not_those_of_another_size(make_net: Any):
    model = make_net(trained=True, use_dora=True).eval()
    rows, x = made_by(model, 10, 30), batches(1, seed=9)[0]["x"]
    expected = fitted(model, rows, rank=1)
    with DoraCaching():
        model(x)  # the norms of the whole adapter are kept from here on
        found = fitted(model, rows, rank=1)
        assert found.row()["measured_increase"] == pytest.approx(expected.row()["measured_increase"], rel=1e-5)
        model(x)
        found.apply()
        kept = model(x)
    torch.testing.assert_close(kept, model(x))


def test_a_layer_that_adds_nothing_and_that_no_row_reaches_is_cut(make_net: Any):
    """An expert is such a layer, where no token of the training reached it, and B is zero still."""
    model = make_net(trained=True)
    idle = [*lora_layers(model).values()][1]
    idle.lora_B["default"].weight.data.zero_()
    idle.forward = lambda x: idle.base_layer(x)
    fit = fitted(model, made_by(model, 10, 30), rank=1)
    assert {*fit.ranks.values()} == {1}
    idle.lora_B["default"].weight.data.fill_(1.0)
    with pytest.raises(UserError, match="saw no token in"):
        fitted(model, made_by(model, 10, 30), rank=1)


def holding(*ranks: int, **row: Any) -> Destination:
    """A place that takes these ranks, from the largest down."""
    return replace(destination("vllm"), ranks=ranks[::-1], least=ranks[-1], most=ranks[0], **row)


def test_a_layer_that_a_place_leaves_out_keeps_no_rank_and_the_proof_is_without_it(two_used: Any):
    rows, lost = made_by(two_used, 20, 30), "layers.1"
    parts, place = Rows(calibration=rows[0], heldout=rows[1]), holding(8, 3, drops=(lost,))
    with pytest.raises(NotWithin, match=f"rank 4 without {lost} is the largest"):
        fit_batches(Judge(two_used, loss), parts, FitRequest(tolerance="0.0001%"), place=place)
    fit = fit_batches(Judge(two_used, loss), parts, FitRequest(rank=4), place=place)
    assert fit.ranks == {"layers.0": 4, lost: 0, "layers.2": 4}
    assert f"the LoRA of {lost}, which vLLM leaves out" in str(fit)

    def mean_loss() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(two_used, batch) for batch in rows[1]]).mean())

    before = mean_loss()
    fit.apply()
    assert not two_used.get_base_model().layers[1].lora_B["default"].weight.any()
    assert mean_loss() - before == pytest.approx(fit.chosen.proof.rise.mean, rel=1e-4)


def test_the_ranks_of_a_place_are_asked_in_their_order(two_used: Any):
    rows = made_by(two_used, 20, 30)

    def asked(*ranks: int, **wanted: Any) -> Fit:
        parts = Rows(calibration=rows[0], heldout=rows[1])
        return fit_batches(Judge(two_used, loss), parts, FitRequest(**wanted), place=holding(*ranks))

    assert asked(3, 2).chosen.rank == 2 and asked(8, 3, 1).chosen.rank == 3
    assert asked(8, 1).is_whole  # 8 holds all of it
    assert [each.rank for each in asked(8, 1, curve=True).curve] == [4, 1]
    with pytest.raises(NotWithin, match="rank 1 is the largest that the place takes"):
        asked(1)
    assert asked(1, tolerance="99%").chosen.rank == 1


def test_a_rank_that_is_named_is_taken_whatever_it_does(two_used: Any):
    rows = made_by(two_used, 20, 30)
    fit = fitted(two_used, rows, rank=1)
    assert fit.by_rank and fit.chosen.rank == 1 and fit.chosen.accepted is False and fit.verdict != "flat"
    assert fit.chosen.proof is not None and fit.chosen.proof.rise.mean > fit.tolerance.loss
    whole = fitted(two_used, rows, rank=9)
    assert whole.is_whole and whole.chosen.proof is None and whole.row()["measured_increase"] is None


def test_the_whole_curve_is_measured_on_demand(make_net: Any):
    """Eight equal directions in every layer: no size is within tolerance, and only the first is asked without it."""
    model = make_net(trained=True, r=8)
    rows = made_by(model, 20, 30)
    for curve, ranks in ((False, [8, 4]), (True, [8, 4, 3, 2, 1])):
        fit = fitted(model, rows, curve=curve)
        assert fit.is_whole and [each.rank for each in fit.curve] == ranks
        assert all(each.proof is not None for each in fit.curve[1:]) and fit.verdict == "capacity-limited"


def test_an_adapter_that_has_learned_nothing_keeps_everything(make_net: Any):
    model = make_net()  # B = 0
    fit = fitted(model, made_by(model, 20, 30))
    assert fit.is_whole and fit.verdict == "unknown" and len(fit.curve) == 1
    rows = made_by(model, 20, 30)
    with pytest.raises(NotWithin, match="rank 2 is the largest .* has not lowered the loss"):  # the whole has no place
        fit_batches(Judge(model, loss), Rows(calibration=rows[0], heldout=rows[1]), FitRequest(), place=holding(2, 1))


def test_both_factors_of_a_cut_have_one_scale(two_used: Any):
    """Gradients that are a millionth of the inputs: B of the balanced basis would hold what float16 cannot."""
    (rows,) = made_by(two_used, 20, noise=1e-6)
    found = calibrate(Judge(two_used, loss), rows)
    for name, (A, B) in cut_factors(two_used, found, dict.fromkeys(found.layers, 2)).items():
        rows_of_A, columns_of_B = A.square().mean(1).sqrt(), B.square().mean(0).sqrt()
        used = (rows_of_A > 0) & (columns_of_B > 0)
        torch.testing.assert_close(rows_of_A[used], columns_of_B[used], rtol=1e-4, atol=0.0, msg=name)


def test_a_record_is_json_whatever_was_measured(two_used: Any, tmp_path: Path):
    found = calibrate(Judge(two_used, loss), batches(4))
    factors = cut_factors(two_used, found, dict.fromkeys(found.layers, 1))
    record = {"metrics": {"base": {"pearson": float("nan")}}}
    write_cut(saved(two_used, tmp_path / "whole"), factors, tmp_path / "small", record)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "small" / FIT_RECORD).read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["base"]["pearson"] is None


def test_a_size_goes_on_where_its_last_look_ended(two_used: Any):
    """It is asked each batch once, and says what one look at all of them says."""
    (rows,), seen = made_by(two_used, 100), []

    def counted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        seen.append(id(batch))
        return loss(model, batch)

    held = HeldOut(Judge(two_used, counted), rows, iter)
    calibration = calibrate(Judge(two_used, loss), rows[:3])
    factors = cut_factors(two_used, calibration, dict.fromkeys(calibration.layers, 1))
    smaller, answers = partial(cut_to, two_used, factors), Answers()
    seen.clear()
    looks = [held.comparison(smaller, part, answers) for part in (0.25, 0.5, 1.0)]
    assert [each.rise.batches for each in looks] == [25, 50, 100] and seen == [id(batch) for batch in rows]
    assert looks[-1].rise == held.comparison(smaller).rise and looks[-1].rise.mean > 0


@pytest.mark.parametrize(
    ("wanted", "value", "of"),
    [
        ({"tolerance": "2%"}, 0.02, "gain"),
        ({"tolerance": "0.5pt"}, 0.005, "accuracy"),
        ({"tolerance": " 3 pt"}, 0.03, "accuracy"),
        ({"changed": "2%"}, 0.02, "answers"),
        ({}, 0.01, "gain"),
    ],
)
def test_a_tolerance_is_of_the_gain_the_accuracy_or_the_answers(wanted: dict[str, Any], value: float, of: str):
    assert FitRequest(**wanted).limit == (pytest.approx(value), of)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        *(({"tolerance": each}, "tolerance is ") for each in (0.02, "0.02", "0%", "x%", "100pt", "1 loss", math.nan)),
        *(({"changed": each}, "changed is ") for each in (0.02, "0.02", "0%", "100%", "2pt", "", "2")),
        ({"tolerance": "1pt", "changed": "2%"}, "tolerance is 1pt and changed is 2%; one of them"),
        ({"rows": 31}, "rows is 31"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_what_cannot_be_wanted_is_refused(wanted: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        FitRequest(**wanted)


def test_few_batches_are_told_and_fewer_refused(two_used: Any):
    with pytest.warns(UserWarning, match="there are 12 batches"):
        assert fitted(two_used, made_by(two_used, 10, 12)).row()["batches"] == 12
    for counts in ((10, 11), (1, 30)):
        with pytest.raises(UserError, match=f"{counts[0]} batches to calibrate and {counts[1]} of held-out"):
            fitted(two_used, made_by(two_used, *counts))


def test_a_held_out_batch_that_is_not_finite_is_told(two_used: Any):
    rows = made_by(two_used, 10, 30)
    rows[1][4]["y"] *= float("nan")
    with pytest.raises(UserError, match="held-out batch 4 is nan"):
        fitted(two_used, rows)

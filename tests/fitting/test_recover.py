"""Recovery after a cut, against least squares, hand arithmetic and autograd; the model stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import close, same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pedyra.fitting.calibration import calibrate, lora_layers
from pedyra.fitting.cut import cut_factors, evened, replaced
from pedyra.fitting.fit import Rows, fit_batches
from pedyra.fitting.judge import DivergenceJudge, Judge, asked, divergence, model_outputs
from pedyra.fitting.recover import distill
from pedyra.fitting.result import Fit
from pedyra.fitting.wanted import Wanted


def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return (model(batch["x"]) - batch["labels"]).square().mean()


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    return [model(batch["x"])]


def fitted(model: Any, rows: list[list[dict[str, Tensor]]], outputs: Any = outputs, **wanted: Any) -> Fit:
    calibration, choice, proof = rows
    judge = Judge(model, loss, outputs)
    return fit_batches(judge, Rows(calibration=calibration, choice=choice, proof=proof), Wanted(**wanted))


def batches(model: nn.Module, count: int, seed: int, width: int = 8) -> list[dict[str, Tensor]]:
    """Rows whose labels are what the model says, with noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(6, width, generator=generator)
        with torch.no_grad():
            y = model(x)
        found.append({"x": x, "labels": y + 0.1 * torch.randn(y.shape, generator=generator)})
    return found


def test_two_layers_in_a_row_recover_what_one_can_take_over_for_the_other():
    """y = (1 + u u^T)(1 + v v^T) x with u = v: without its own direction the first layer gives x, and the second then
    gives the whole function with u u^T * 3. No label says so: they are noise here."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.first.weight), nn.init.eye_(self.second.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model: Any = get_peft_model(Two(), LoraConfig(r=1, lora_alpha=1, target_modules=["first", "second"]))
    u = torch.full((4, 1), 0.5)  # of length 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(u.T if "lora_A" in name else u)
    rows = [{"x": each["x"], "labels": torch.randn(6, 4)} for each in batches(model, 8, 0, width=4)]
    none = (torch.zeros(0, 4), torch.zeros(4, 0))
    found = distill(Judge(model, loss, outputs), {"first": none, "second": (u.T, u)}, rows, 200, rate=0.1)
    A, B = found["second"]
    torch.testing.assert_close(B @ A, 3 * u @ u.T, rtol=1e-3, atol=1e-3)
    assert [each.shape for each in found["first"]] == [(0, 4), (4, 0)]


def test_divergence_by_hand():
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log().item(), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    expected = (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()) / 2
    assert close(divergence(student, teacher), expected)


def test_evened_factors_have_the_same_product_and_one_size():
    A, B = torch.randn(3, 8) * torch.tensor([[1e-3], [1.0], [10.0]]), torch.randn(5, 3)
    B[:, 2] = 0  # a direction that adds nothing stays as it is
    C, D = evened(A, B)
    assert close(D @ C, B @ A)
    assert close(C.square().mean(1)[:2], D.square().mean(0)[:2])
    assert same_bits(C[2], A[2])


def test_a_language_model_is_asked_where_a_label_is(make_llama: Any):
    model = make_llama()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, 7, 8]])}
    (found,) = model_outputs(model, batch)
    torch.testing.assert_close(found, model(**batch).logits[0, 1:3])


def test_a_language_model_comes_nearer_to_what_it_said(make_llama: Any):
    model = make_llama(r=2).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    rows = [{"input_ids": torch.randint(3, 40, (4, 6))} for _ in range(4)]
    rows = [{**each, "labels": each["input_ids"]} for each in rows]
    judge = Judge(model)
    found = calibrate(judge, rows)
    cut = cut_factors(model, found, dict.fromkeys(found.layers, 1))
    recovered = distill(judge, cut, rows, 60, rate=0.05)

    def distance(factors: Any) -> float:
        (teacher,) = model_outputs(model, rows[0])
        with replaced(model, factors), torch.no_grad():
            return float(divergence(model_outputs(model, rows[0])[0], teacher))

    assert distance(recovered) < 0.8 * distance(cut)


def test_an_encoder_decoder_is_asked_at_the_label_itself():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[4, 3, -100]])}
    (found,) = model_outputs(model, batch)
    torch.testing.assert_close(found, model(**batch).logits[0, :2])


def test_what_is_no_token_of_the_labels_is_asked_everywhere():
    """The frames of a sound have no place in its words; and classes stand before the places of a picture."""
    frames, words = torch.randn(2, 9, 5), torch.tensor([[1, 2, -100], [3, 4, 1]])
    (found,) = asked(nn.Linear(1, 1), {"labels": words}, {"logits": frames})
    assert same_bits(found, frames)
    pixels = torch.randn(2, 5, 3, 4)
    (found,) = asked(nn.Linear(1, 1), {"labels": torch.zeros(2, 3, 4)}, {"logits": pixels})
    assert found.shape == (2, 3, 4, 5) and same_bits(found[1, 2, 3], pixels[1, :, 2, 3])


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_the_folder_holds_what_was_recovered_and_proved(make_net: Any, tmp_path: Path, settings: Any):
    model = make_net(trained=True, **settings)
    rows = [batches(model, 10, seed) for seed in (1, 2, 3)]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    fits = [fitted(model, rows, parameters=120, recover=steps) for steps in (0, 60)]
    assert all(same_bits(before[name], each) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    cut, found = fits
    assert cut.chosen.recovered is None and "recovered" not in cut.row()
    assert found.ranks == cut.ranks and found.chosen.choice == cut.chosen.choice
    assert found.chosen.gains_by_recovery and found.row()["recovered"] is True
    assert proof(found) < 0.8 * proof(cut)
    loaded = PeftModel.from_pretrained(make_net(**settings).unload(), str(found.save(tmp_path / "out"))).eval()
    with torch.no_grad(), replaced(model, found.factors):
        x = rows[2][0]["x"]
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        rises = [float(loss(loaded, each) - loss(model, each)) for each in rows[2]]
    assert proof(found) == pytest.approx(sum(rises) / len(rises), rel=1e-3)


def proof(fit: Fit) -> float:
    assert fit.chosen.proof is not None
    return fit.chosen.proof.mean


def test_what_recovers_is_chosen_smaller_and_proved_after_its_steps(make_net: Any):
    model = make_net(trained=True)
    rows = [batches(model, 30, seed) for seed in (1, 2, 3)]
    cut, found = (fitted(model, rows, tolerance=0.1, recover=steps) for steps in (0, 200))
    assert found.chosen.parameters < cut.chosen.parameters
    with torch.no_grad():
        whole = [float(loss(model, each)) for each in rows[2]]
        with replaced(model, found.factors):
            rises = [float(loss(model, each)) - before for each, before in zip(rows[2], whole, strict=True)]
    assert proof(found) == pytest.approx(sum(rises) / len(rises), rel=1e-3)
    assert proof(found) <= found.tolerance.loss
    tried = {row["parameters"] for row in found.curve_rows() if row["recovered_increase"] is not None}
    assert found.chosen.parameters in tried


def test_the_curve_says_on_which_rows_a_size_was_measured_as_cut_and_after_recovery(make_net: Any):
    model = make_net(trained=True)
    rows = [batches(model, 30, seed) for seed in (1, 2, 3)]
    found = fitted(model, rows, tolerance=0.1, recover=200)
    (chosen,) = (row for row in found.curve_rows() if row["chosen"])
    assert (chosen["rows"], chosen["recovered_rows"]) == ("choice", "proof")
    with torch.no_grad():
        whole = [float(loss(model, each)) for each in rows[1]]
        with replaced(model, cut_factors(model, found.calibration, found.ranks)):
            rises = [float(loss(model, each)) - before for each, before in zip(rows[1], whole, strict=True)]
    assert chosen["measured_increase"] == pytest.approx(sum(rises) / len(rises), rel=1e-3)
    assert chosen["recovered_increase"] == found.row()["measured_increase"]


def test_steps_that_do_harm_are_undone(make_net: Any):
    """Toward outputs that have nothing to do with the loss: the cut stays, and this is told."""
    model = make_net(trained=True)
    rows = [batches(model, 10, seed) for seed in (1, 2, 3)]

    def nonsense(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        sign = 1 if torch.is_grad_enabled() else -1
        return [sign * model(batch["x"])]

    cut = fitted(model, rows, parameters=120, recover=0)
    found = fitted(model, rows, nonsense, parameters=120, recover=30)
    recovered, measured = found.chosen.recovered, found.chosen.choice
    assert recovered is not None and measured is not None and recovered.mean > measured.mean
    assert proof(found) == proof(cut)
    assert found.row()["recovered"] is False and "steps of recovery" not in str(found)


def test_a_step_that_is_not_finite_changes_nothing(make_net: Any):
    model = make_net(trained=True)
    judge = Judge(model, loss, outputs)
    rows = batches(model, 3, 1)
    ranks = {"layers.0": 2, "layers.1": 2, "layers.2": 4}
    factors = cut_factors(model, calibrate(judge, rows), ranks)
    rows[1]["x"][0, 0] = float("nan")
    with_nan = distill(judge, factors, [rows[1]], 3)
    for name, (A, B) in factors.items():
        assert close(with_nan[name][1] @ with_nan[name][0], B @ A)


def unknown(model: nn.Module, batch: Any) -> list[Tensor]:
    raise TypeError("no such argument")


@pytest.mark.parametrize("says, why", [(lambda model, batch: [], "gives no logits"), (unknown, "raises TypeError")])
def test_a_model_that_says_nothing_cannot_recover(make_net: Any, caplog: pytest.LogCaptureFixture, says: Any, why: str):
    model = make_net(trained=True)
    rows = [batches(model, 10, seed) for seed in (1, 2, 3)]
    with pytest.raises(ValueError, match=why):
        fitted(model, rows, says, parameters=120, recover=3)
    found = fitted(model, rows, says, parameters=120)  # by default it is cut alone, and this is told
    assert why in caplog.text and found.chosen.recovered is None and "recover_steps" not in found.row()


@pytest.mark.parametrize("count, steps", [(14, 28), (100, 160)])
def test_by_default_recovery_takes_no_batch_more_than_twice(make_net: Any, count: int, steps: int):
    model = make_net(trained=True)
    rows = [batches(model, number, seed) for number, seed in ((count, 1), (10, 2), (10, 3))]
    assert fitted(model, rows, parameters=120).row()["recover_steps"] == steps


def test_an_output_that_is_one_number_is_compared_as_a_number(make_net: Any):
    """The softmax of one number is 1, whatever it is."""
    model = make_net(trained=True)
    rows = [{"x": each["x"]} for each in batches(model, 4, 1)]

    def outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        return [model(batch["x"])[:, :1]]

    judge = Judge(model, lambda model, batch: outputs(model, batch)[0].mean(), outputs)
    factors = cut_factors(model, calibrate(judge, rows), {"layers.0": 1, "layers.1": 1, "layers.2": 1})
    recovered = distill(judge, factors, rows, 30)
    with torch.no_grad():
        teacher = [outputs(model, row)[0] for row in rows]

        def distance(factors: Any) -> float:
            with replaced(model, factors):
                return sum(
                    float((outputs(model, r)[0] - t).square().mean()) for r, t in zip(rows, teacher, strict=True)
                )

        assert distance(recovered) < 0.8 * distance(factors)


def test_the_divergence_is_predicted_by_what_the_model_itself_would_say(make_net: Any):
    """Where the loss is a surrogate, nothing but the divergence from the whole adapter is measured: the prediction from
    gradients of the model's own samples is its second order: of the same size."""
    model = make_net(trained=True).eval()

    def outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        return [4 * model(batch["x"])]

    judge = DivergenceJudge(model, outputs, nullcontext)
    rows = [[{"x": each["x"]} for each in batches(model, 150, seed)] for seed in (1, 2, 3)]
    fit = fit_batches(
        judge, Rows(calibration=rows[0], choice=rows[1], proof=rows[2]), Wanted(parameters=100, recover=0)
    )
    assert fit.measure == "divergence from the whole adapter" and fit.measure in str(fit)
    assert proof(fit) > 0
    assert 1 / 4 < fit.chosen.predicted / proof(fit) < 4


def test_a_loss_that_is_scaled_for_half_precision_says_the_same(make_net: Any):
    model = make_net(trained=True).eval()
    rows = batches(model, 20, 1)
    judges = [Judge(model, loss, outputs), DivergenceJudge(model, outputs, nullcontext)]
    for judge in judges:
        torch.manual_seed(0)
        once = judge.trained_loss(rows[0])
        judge.loss_scale = 1024.0
        torch.manual_seed(0)
        assert close(judge.trained_loss(rows[0]), 1024 * once)
    scaled, plain = judges[0], Judge(model, loss, outputs)
    factors = cut_factors(model, calibrate(plain, rows), {name: 1 for name in lora_layers(model)}, "default")
    found = [distill(judge, factors, rows, 20) for judge in (plain, scaled)]
    for name, pair in found[0].items():
        for one, other in zip(pair, found[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

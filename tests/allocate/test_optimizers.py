"""Trainer's optimizers: ranks move under them, or they are refused; and `pedyra.fit` answers after all of them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from works_with import note, refused, rows

import pedyra
from pedyra.allocate.optimizer_state import check_optimizer

# What bitsandbytes says without a GPU: of its import, and that a CPU has no pages.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

OF_TORCH = ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"]
IN_BYTES = ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"]
IN_FLOATS = ["paged_adamw_32bit", "lion_32bit", "paged_lion_32bit"]
ADEMAMIX = ["ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"]
REFUSED = ["adafactor", "Muon", "schedule_free_adamw", *ADEMAMIX]
BY_NAME = {
    "galore_adamw_8bit": "GaLoreAdamW8bit",
    "adalomo": "AdaLomo",
    "apollo_adamw": "APOLLOAdamW",
}
"""Those whose packages are not installed here, and the classes that they have there."""


class Wider(nn.Module):
    """Adapters of r = 9 on both sides of 4,096 elements, below which bitsandbytes keeps 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 512), nn.Linear(512, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = nn.functional.one_hot(input_ids, 64).float().mean(1)
        logits = self.second(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def wider() -> Any:
    torch.manual_seed(1)
    return lambda: get_peft_model(Wider(), LoraConfig(r=9, lora_alpha=18, target_modules=["first", "second"]))


@pytest.mark.filterwarnings("ignore:there are .* batches of held-out rows")
@pytest.mark.parametrize("optim", [*OF_TORCH, *IN_BYTES, *IN_FLOATS])
def test_a_run_moves_ranks_and_resumes_bit_for_bit(
    optim, wider, make_trainer, quick, tmp_path, run_state, assert_equal
):
    if optim in (*IN_BYTES, *IN_FLOATS):
        pytest.importorskip("bitsandbytes")
    at = 6  # between the adjustments after 3, 5 and 7

    def run(out, resume: Any = None) -> Any:
        torch.manual_seed(1)
        arguments = dict(optim=optim, learning_rate=1e-3, save_strategy="steps", save_steps=at)
        trainer, callback = make_trainer(out, quick(moves=6), model=wider(), **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, run_state(trainer, callback)

    trainer, unbroken = run(tmp_path / "whole")
    assert any(record["pruned"] for record in unbroken["history"])
    states = [value for state in unbroken["optimizer"].values() for key, value in state.items() if key == "state1"]
    if optim in IN_BYTES:
        assert {state.dtype for state in states} == {torch.uint8, torch.float32}
    elif optim in IN_FLOATS:
        assert {state.dtype for state in states} == {torch.float32}
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{at}", tmp_path / "again" / f"checkpoint-{at}")
    assert_equal(run(tmp_path / "again", str(tmp_path / "again" / f"checkpoint-{at}"))[1], unbroken)
    trainer.eval_dataset = list(trainer.train_dataset)[1:]  # that a fit runs is asked, and not how good it is
    with pytest.warns(UserWarning, match="16 batches of held-out rows"):
        assert pedyra.fit(trainer, rows=48, tolerance="50%").measure == "loss"
    note("optimizer", optim, ranks="move", resume="the same bits", fit="works")


@pytest.mark.filterwarnings("ignore:there are .* batches of held-out rows")
@pytest.mark.parametrize("optim", REFUSED)
def test_what_cannot_follow_is_refused_before_the_first_step_and_fitted_afterwards(
    optim, wider, make_trainer, tmp_path
):
    arguments = {"optim": optim}
    if optim in ADEMAMIX:
        pytest.importorskip("bitsandbytes")
    elif optim == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
        arguments["lr_scheduler_type"] = "constant"
    elif optim == "Muon":  # of torch, which no name of `optim` gives
        arguments = {}
    trainer, callback = make_trainer(tmp_path, model=wider(), **arguments)
    if optim == "Muon":
        matrices = [p for p in trainer.model.parameters() if p.requires_grad and p.ndim == 2]
        trainer.optimizer = torch.optim.Muon(matrices, lr=0.02)
    with pytest.raises(ValueError, match="cannot follow a rank change; use optim=.adamw_torch.*pedyra.fit") as told:
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.remove_callback(callback)
    trainer.train()
    pedyra.detach(trainer.model)
    trainer.eval_dataset = list(trainer.train_dataset)[1:]  # that a fit runs is asked, and not how good it is
    with pytest.warns(UserWarning, match="16 batches of held-out rows"):
        assert pedyra.fit(trainer, rows=48, tolerance="50%").measure == "loss"
    note("optimizer", optim, ranks=refused(told.value), resume="", fit="works")


@pytest.mark.parametrize("optim", BY_NAME)
def test_optimizers_of_packages_that_are_not_here_are_refused_by_name(optim):
    made = type(BY_NAME[optim], (torch.optim.SGD,), {})([nn.Parameter(torch.randn(4, 4))], lr=0.1)
    with pytest.raises(ValueError, match="cannot follow a rank change; use optim=.adamw_torch.*pedyra.fit") as told:
        check_optimizer(made)
    note(
        "optimizer",
        optim,
        ranks=f"{refused(told.value)} (by its name: it was not installed)",
        resume="",
        fit="not run here",
    )


def test_a_layer_that_began_above_its_width_may_grow_back_after_a_resume(
    wider, make_trainer, quick, tmp_path, run_state, assert_equal
):
    """`second` has two outputs and begins at rank 9."""

    def run(resume: Any = None) -> Any:
        torch.manual_seed(1)
        arguments = dict(learning_rate=1e-3, save_strategy="steps", save_steps=3)
        trainer, callback = make_trainer(tmp_path, quick(moves=6), model=wider(), **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return run_state(trainer, callback)

    unbroken = run()
    assert [record["ranks"]["second"] for record in unbroken["history"]][:2] == [5, 6]
    assert_equal(run(str(tmp_path / "checkpoint-3")), unbroken)


def test_the_docs_have_a_row_of_every_optimizer():
    known = {*OF_TORCH, *IN_BYTES, *IN_FLOATS, *REFUSED, *BY_NAME}
    assert {row["name"] for row in rows() if row["kind"] == "optimizer"} == known, "run: make works-with"

"""A method refuses in one line that names the setting, before a model is trained, but where a row says so."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from transformers import Trainer, TrainingArguments

import pedyra
from pedyra import PeDyra

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("pissa", {"lora": {"init": "olora"}}, "lora.init is 'olora', .* pissa is a start of its own"),
    ("lora", {"lora": {"init": "pisa"}}, "init_lora_weights='pisa'"),
    ("lora", {"settings": {"bogus": 1}}, "method.bogus is no setting of method lora; it has none"),
    ("lora+", {"settings": {"ration": 2}}, "method.ration is no setting of method lora.; did you mean 'ratio'"),
    ("lora+", {"settings": {"ratio": 0.5}}, "method.ratio is 0.5; it must be at least 1"),
    ("lora+", {"settings": {"ratio": True}}, "method.ratio is True; it must be a finite number"),
    ("lora+", {"settings": {"ratio": math.inf}}, "method.ratio is inf; it must be a finite number"),
    ("adalora", {"settings": {"final_rank": 12.5}}, "method.final_rank is 12.5; it must be an integer"),
    ("adalora", {"settings": {"budget": "ranks"}}, "method.budget is no setting of method adalora"),
    (
        "adalora",
        {"settings": {"final_rank": 4}},
        "begins at rank 4, .* down to final_rank 4; give it r=6, or lower",
    ),
    ("adalora", {"lora": {"init": "pissa"}}, "lora.init is 'pissa', but PEFT's AdaLoRA does not have it"),
    ("randlora", {"lora": {"use_dora": True}}, "lora.use_dora is True, but PEFT's RandLoRA does not have it"),
    ("adalora-svd", {"settings": {"omega": "gradient"}}, "method.omega is no setting of method adalora-svd"),
    ("adalora-svd", {"settings": {"final_rank": 4}}, "the LoRA begins at rank 4, .* down to final_rank 4"),
    ("adalora-svd", {"lora": {"init": "olora"}}, "LoRA has init_lora_weights='olora', but AdaLoRA defines its own"),
    ("prune", {"settings": {"moves": 3}}, "method.moves is no setting of method prune"),
    (
        "increlora",
        {"settings": {"final_rank": 4}},
        "begins at rank 4, but layers grow .* up to final_rank 4; give",
    ),
    ("triadaptlora", {"settings": {"final_rank": 3}}, "LoRA begins at rank 4, but layers grow .* up to final_rank 3"),
    ("expand", {"settings": {"final_rank": 4}}, "begins at rank 4, but layers grow .* up to final_rank 4; give"),
    ("increlora", {"budget": 1}, "cannot have the size of a LoRA of r = 1; raise r"),
    ("expand", {"budget": 1}, "nothing can grow at r = 1; raise r"),
    ("elalora", {"lora": {"r": 1}}, "the LoRA has r = 1, but ElaLoRA never takes a layer's last rank"),
    ("elalora", {"settings": {"moves": 0}}, "method.moves is 0; it must be an integer of at least 1"),
    ("dylora", {"settings": {"rank": 5}}, "rank is 5, but the LoRA has ranks 1 to 4; give one of them"),
    ("dylora", {"lora": {"use_dora": True}}, "the LoRA has use_dora=True, but DyLoRA defines"),
    ("rasa", {"lora": {"r": 1}}, "has rank 1, which leaves no rank to share .* r to 2 or more"),
    ("rasa", {"lora": {"use_rslora": True}}, "the LoRA has use_rslora=True, but RaSA defines"),
    ("rasa", {"lora": {"target_modules": ["pooler.dense"]}}, "no two layers of the LoRA are of one type"),
    ("sora", {"settings": {"threshold": -1e-3}}, "method.threshold is -0.001; it must be at least 0"),
    ("sora", {"lora": {"init": "olora"}}, "the LoRA has init_lora_weights='olora', but SoRA defines"),
    ("autolora", {"lora": {"r": 1}}, "the LoRA has r = 1, and AutoLoRA keeps one rank of each layer"),
    ("autolora", {"lora": {"use_dora": True}}, "the LoRA has use_dora=True, but AutoLoRA defines"),
    ("mask", {"settings": {"start": "lora"}}, "method.start is 'lora', but Mask sets E to 0"),
]
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4}
BY_THE_RUN: list[tuple[str, dict[str, Any], str]] = [
    ("adalora", {"training": {**BEST, "eval_steps": 4}}, "load_best_model_at_end=True"),
    ("adalora", {"training": {"label_smoothing_factor": 0.1}}, "=0.1, but it computes its own loss"),
    ("adalora", {"training": {"max_steps": 5}}, "no rank could ever move: "),
    # 13 layers from 1 to 4 by one adjustment of at most 2 each.
    ("increlora", {"settings": {"interval": 6}}, "^1 adjustments of 13 layers x 2 ranks add 26 of the 39 ranks up to"),
]


@pytest.mark.parametrize(("method", "sections", "line"), REFUSED)
def test_a_method_refuses_what_it_cannot_be(method: str, sections: dict[str, Any], line: str, prepare: Any):
    with pytest.raises(ValueError, match=line):
        prepare(method, **sections)


@pytest.mark.parametrize(("method", "sections", "line"), BY_THE_RUN)
def test_a_run_in_which_a_method_cannot_work_ends_before_its_first_step(
    method: str, sections: dict[str, Any], line: str, prepare: Any
):
    with pytest.raises(ValueError, match=line):
        prepare(method, **sections).train()


def with_optimizer(run: Any, method: Any) -> None:
    optimizer = run.trainer.create_optimizer()
    args = TrainingArguments("x", use_cpu=True, report_to="none")
    pedyra.adapt(Trainer(run.model, args, optimizers=(optimizer, None)), method)


OF_THE_TRAINER: dict[str, tuple[Any, str]] = {
    "a class": (
        lambda run: pedyra.adapt(run.trainer, cast(Any, pedyra.Sora)),
        r"is no method .* give one, such as Sora\(\)",
    ),
    "no adapter of that name": (
        lambda run: pedyra.adapt(run.trainer, pedyra.Sora(), adapter="other"),
        "no LoRA adapter named 'other'",
    ),
    "adapted twice": (
        lambda run: [pedyra.adapt(run.trainer, each) for each in (PeDyra(), pedyra.DyLora())],
        "adapted already; call adapt once",
    ),
    "an optimizer beside the method's": (
        lambda run: with_optimizer(run, pedyra.LoraPlus()),
        "has an optimizer, and LoraPlus makes its own; leave out optimizers=",
    ),
    "an optimizer of parameters that are no more": (
        lambda run: with_optimizer(run, pedyra.IncreLora()),
        "the optimizer does not hold lora_A .* IncreLora begins with parameters of its own: leave out optimizers=",
    ),
    "slots of a method that broke off": (
        lambda run: [pedyra.Sora().install(run.model), pedyra.adapt(run.trainer, pedyra.DyLora())],
        "as a method left it whose training broke off; make the model anew",
    ),
}


@pytest.mark.parametrize("case", OF_THE_TRAINER)
def test_what_a_trainer_cannot_have_is_told_by_adapt(case: str, prepare: Any):
    act, line = OF_THE_TRAINER[case]
    with pytest.raises(ValueError, match=line):
        act(prepare("lora"))


def test_a_method_that_has_ended_does_not_begin_again(prepare: Any):
    run = prepare("sora").train()
    with pytest.raises(ValueError, match="Sora has ended, and its adapter is an ordinary LoRA; make a new model"):
        run.trainer.train()

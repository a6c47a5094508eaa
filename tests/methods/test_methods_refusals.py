"""A method refuses in one line that names the setting, before a model is trained, but where a row says so."""

from __future__ import annotations

import math
from typing import Any

import pytest

BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("pissa", {"lora": {"init": "olora"}}, "lora.init is 'olora', .* pissa is a start of its own"),
    ("lora", {"lora": {"init": "pisa"}}, "init_lora_weights='pisa'"),
    ("lora", {"method_settings": {"bogus": 1}}, "method_settings.bogus is no setting of method lora; it has none"),
    ("lora+", {"method_settings": {"ration": 2}}, "method_settings.ration is no setting .*; did you mean 'ratio'"),
    (
        "lora+",
        {"method_settings": {"ratio": 0.5}},
        "method_settings.ratio is 0.5: Input should be greater",
    ),
    ("lora+", {"method_settings": {"ratio": True}}, "method_settings.ratio is True: Input should be a valid number"),
    ("lora+", {"method_settings": {"ratio": math.inf}}, "method_settings.ratio is inf: Input should be a finite"),
    ("adalora", {"method_settings": {"initial_rank": 12.5}}, "initial_rank is 12.5: Input should be a valid integer"),
    ("randlora", {"lora": {"use_dora": True}}, "lora.use_dora is True, but PEFT's RandLoRA does not have it"),
    ("adalora", {"lora": {"init": "pissa"}}, "lora.init is 'pissa', but PEFT's AdaLoRA does not have it"),
    ("adalora", {"method_settings": {"initial_rank": 4}}, r"initial_rank is 4, .* prunes from it down to lora.r \(4\)"),
    (
        *("adalora", {"method_settings": {"initial_rank": 2, "final_rank": 2}}),
        r"initial_rank is 2, .* down to method_settings.final_rank \(2\); raise",
    ),
    ("increlora", {"lora": {"r": 1}}, "lora.r is 1, but IncreLoRA starts at rank 1"),
    ("triadaptlora", {"lora": {"r": 1}}, "lora.r is 1, but TriAdaptLoRA starts at rank 1"),
    ("dylora", {"method_settings": {"rank": 5}}, r"rank is 5, above .* 1 to lora.r \(4\); lower it"),
    ("dylora", {"lora": {"use_dora": True}}, "lora.use_dora is True, but DyLoRA defines"),
    ("rasa", {"lora": {"r": 1}}, "lora.r is 1, which leaves no rank to share .* raise it to 2"),
    ("rasa", {"lora": {"use_rslora": True}}, "lora.use_rslora is True, but RaSA defines"),
    ("rasa", {"lora": {"target_modules": ["pooler.dense"]}}, "no two layers of one type"),
    ("sora", {"method_settings": {"threshold": -1e-3}}, "threshold is -0.001: Input should be greater"),
    ("sora", {"lora": {"init": "olora"}}, "lora.init is 'olora', but SoRA defines"),
    ("autolora", {"lora": {"r": 1}}, "lora.r is 1, for which AutoLoRA searches two ranks"),
    ("autolora", {"lora": {"use_dora": True}}, "lora.use_dora is True, but AutoLoRA weighs"),
    ("expand", {"lora": {"r": 1}}, "lora.r is 1, but method expand starts at half of lora.r"),
    ("mask", {"rank": {"start": "lora"}}, "rank.start is 'lora', but method mask sets E to 0"),
]
BY_THE_RUN: list[tuple[str, dict[str, Any], str]] = [
    ("adalora", {"training": {**BEST, "eval_steps": 4}}, "load_best_model_at_end is True"),
    ("adalora", {"training": {"label_smoothing_factor": 0.1}}, "is 0.1, but it computes its own loss"),
    ("adalora", {"training": {"max_steps": 5}}, "no rank could ever move: "),
    # 13 layers from 1 to 4 by one adjustment of at most 2 each.
    ("increlora", {"rank": {"interval": 6}}, "^1 adjustments of 13 layers x 2 ranks add 26 of the 39 ranks up to the"),
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

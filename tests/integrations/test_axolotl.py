"""PedyraPlugin under axolotl's plugin manager, or, where axolotl is not installed, under what its base class says."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from classifier_rows import rows
from transformers import Trainer, TrainingArguments
from works_with import note

IS_INSTALLED = importlib.util.find_spec("axolotl") is not None


class StandInPlugin:
    """axolotl.integrations.base.BasePlugin of axolotl 0.19: the hooks that are used, which do nothing."""

    def register(self, cfg: dict) -> None:
        pass

    def get_input_args(self) -> str | None:
        pass

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        pass

    def post_train(self, cfg: Any, model: Any) -> None:
        pass


@pytest.fixture
def plugin(monkeypatch: Any) -> Any:
    """The plugin as axolotl makes it from its name."""
    if IS_INSTALLED:
        from axolotl.integrations.base import BasePlugin, load_plugin

        made = load_plugin("pedyra.integrations.axolotl.PedyraPlugin")
        assert isinstance(made, BasePlugin)
        return made
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.utils", "axolotl.utils.logging")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[names[2]], "BasePlugin", StandInPlugin, raising=False)
    monkeypatch.setattr(sys.modules[names[4]], "get_logger", logging.getLogger, raising=False)
    monkeypatch.delitem(sys.modules, "pedyra.integrations.axolotl", raising=False)
    from pedyra.integrations.axolotl import PedyraPlugin

    return PedyraPlugin()


KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")


@pytest.mark.parametrize(
    ("section", "off"),
    [
        ({"method": "pedyra"}, True),
        ({"method": "pedyra", "settings": {"alpha": 1}}, False),  # gradients alone, which a kernel gives too
        ({"fit": {}}, True),
        ({"method": "pedyra", "settings": {"alpha": 1}, "fit": {"tolerance": "2%"}}, True),
        ({}, False),
    ],
)
@pytest.mark.parametrize("given", [None, True])
def test_kernels_are_off_where_the_method_has_to_see_the_layers(plugin: Any, section: Any, off: bool, given: Any):
    config = {"pedyra": section, "adapter": "qlora"} | ({} if given is None else dict.fromkeys(KERNELS, given))
    plugin.register(config)
    for kernel in KERNELS:
        assert config.get(kernel) is (False if off else given)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"method": "lora"}, "method"),
        ({"metod": "pedyra"}, "metod"),
        ({"settings": {"alpha": 1}}, "pedyra.settings is given without"),
        ({"method": "pedyra", "settings": {"alpha": 2}}, "alpha is 2; it weighs two scores"),
        ({"fit": {"tolerance": 3}}, "tolerance is .3.; it is a part of the gain"),
        ({"method": "pedyra", "settings": {"nope": 1}}, "pedyra.settings: .*nope"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(plugin: Any, section: Any, told: str):
    with pytest.raises(ValueError, match=told):
        plugin.register({"pedyra": section})


def test_a_run_moves_ranks_and_ends_with_a_smaller_adapter(plugin: Any, make_bert: Any, tmp_path: Path):
    section = {
        "method": "pedyra",
        "settings": {"interval": 4, "initial_warmup": 2, "final_warmup": 10, "moves": 2},
        "fit": {"rank": 1, "rows": 48},
    }
    config = {"pedyra": section}
    plugin.register(config)
    cfg = SimpleNamespace(**config, output_dir=str(tmp_path))
    model = make_bert()
    args = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows(64, 1), eval_dataset=rows(48, 2))
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert trainer.callback_handler.callbacks[0].result.added > 0  # type: ignore[union-attr]
    for _ in range(2):  # axolotl 0.19 calls it after training, and again after saving
        plugin.post_train(cfg, trainer.model)
    from pedyra.lora.inspection import inspect_adapter

    *layers, _ = inspect_adapter(tmp_path / "fit")
    assert {layer["rank"] for layer in layers} == {1}
    if IS_INSTALLED:
        note("tool", "axolotl", "axolotl", run="works: its plugin manager and hooks")


def test_a_fit_that_is_refused_does_not_keep_axolotl_from_saving(
    plugin: Any, make_bert: Any, tmp_path: Path, caplog: Any
):
    config = {"pedyra": {"fit": {}}}
    plugin.register(config)
    cfg = SimpleNamespace(**config, output_dir=str(tmp_path))
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(make_bert(), args, train_dataset=rows(64, 1), eval_dataset=rows(8, 2))
    plugin.post_trainer_create(cfg, trainer)
    with caplog.at_level("ERROR"):
        plugin.post_train(cfg, trainer.model)
    assert "4 of held-out rows" in caplog.text and "pedyra fit" in caplog.text


def test_without_a_section_nothing_is_added(plugin: Any):
    cfg = SimpleNamespace(pedyra=None, output_dir="nowhere")
    plugin.post_trainer_create(cfg, object())
    plugin.post_train(cfg, None)
    assert not Path("nowhere").exists()

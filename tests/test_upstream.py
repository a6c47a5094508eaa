"""What pedyra relies on in torch, peft, transformers and accelerate that they do not promise, all of it in this file.

A test that fails names what upstream has changed. The versions that were run are in docs/bases.md.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from closeness import same_bits
from packaging.version import Version
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key, transpose
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

# peft


def test_peft_moved_the_dicts_by_adapter_of_a_lora_layer(make_net):
    """`lora.layer`, `lora.attach`: slots, scaling and rank are kept by the adapter's name."""
    layer = make_net(use_rslora=True).base_model.model.layers[0]
    assert isinstance(layer, LoraLayer) and type(layer) is Linear
    for name in ("lora_A", "lora_B", "scaling", "r", "lora_alpha", "use_rslora", "lora_dropout"):
        assert "default" in getattr(layer, name), name
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 8, 4.0)
    assert layer.get_base_layer() is layer.base_layer and layer.active_adapters == ["default"]


def test_peft_computes_a_lora_otherwise_than_base_plus_scaled_b_a(make_net):
    """`lora.factors`, `fitting` and `export` rely on it."""
    layer = make_net(trained=True).base_model.model.layers[0]
    x = torch.randn(3, 8)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + layer.scaling["default"] * x @ A.T @ B.T)


def test_peft_no_longer_reads_full_names_in_patterns():
    """`lora.attach.write_ranks` writes full module paths into `rank_pattern`."""
    assert get_pattern_key(["model.layers.1.q_proj", "q_proj"], "model.layers.1.q_proj") == "model.layers.1.q_proj"
    assert get_pattern_key(["layers.1.q_proj"], "layers.11.q_proj") == "layers.11.q_proj"  # none


def test_peft_moved_what_the_starts_need():
    """`lora.start`."""
    assert {"embed_tokens", "lm_head"} <= set(EMBEDDING_LAYER_NAMES)
    assert same_bits(transpose(torch.ones(2, 3), True), torch.ones(3, 2))


# transformers


class Recorder(TrainerCallback):
    """The order of Trainer's events and of what it does between them."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name not in ("on_train_begin", "on_pre_optimizer_step", "on_step_end"):
            return lambda *args, **kwargs: self.seen.append(name)
        return super().__getattribute__(name)

    def on_train_begin(self, args, state, control, **kwargs):
        self.optimizer, self.model = kwargs["optimizer"], kwargs["model"]
        step = self.optimizer.optimizer.register_step_pre_hook(lambda *_: self.seen.append("step"))
        self.handle = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append("on_pre_optimizer_step")
        found = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.norm = float(torch.stack(found).norm())

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append("on_step_end")
        self.cleared = all(p.grad is None for p in self.model.parameters())


@pytest.fixture
def recorded(make_trainer: Any, tmp_path: Path) -> tuple[Trainer, Recorder]:
    trainer, _ = make_trainer(tmp_path / "run", max_steps=8, max_grad_norm=1e-3, save_strategy="steps", save_steps=8)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder


def test_trainer_calls_its_events_in_another_order(recorded):
    """`trainer.adapt`: gradients are read after clipping and before the step; ranks move once they are cleared."""
    _, recorder = recorded
    events = [name for name in recorder.seen if name in ("on_pre_optimizer_step", "step", "on_step_end", "on_save")]
    assert events[:3] == ["on_pre_optimizer_step", "step", "on_step_end"] and events[-1] == "on_save"
    assert recorder.norm == pytest.approx(1e-3, rel=1e-2) and recorder.cleared


def test_trainers_loop_is_no_longer_handed_the_checkpoint_by_name(recorded):
    """`trainer.adapt.MethodTraining.training`."""
    assert "resume_from_checkpoint=resume_from_checkpoint," in inspect.getsource(Trainer.train)
    assert "self._inner_training_loop," in inspect.getsource(Trainer.train)
    assert "resume_from_checkpoint" in inspect.signature(Trainer._inner_training_loop).parameters


def test_trainer_renamed_what_a_checkpoint_is_saved_with(recorded, tmp_path):
    """`trainer.checkpoints.save_whole`."""
    trainer, _ = recorded
    assert trainer._get_output_dir(trial=None) == str(tmp_path / "run")
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert callable(trainer._push_from_checkpoint)


def test_trainer_no_longer_takes_the_batches_of_a_step_from_get_batch_samples():
    """`trainer.changes.end_at_last_step`; what comes of it is in test_resume, of the very last step."""
    assert "self.get_batch_samples(epoch_iterator, " in inspect.getsource(Trainer)


def test_trainer_renamed_what_it_does_otherwise_under_fsdp(recorded):
    """`trainer.engines.keep_whole`; what comes of it is in test_sharded."""
    trainer, _ = recorded
    assert trainer.is_fsdp_enabled is False and trainer.accelerator.sync_gradients is True
    for name in ("save_model", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_best_model"):
        assert "self.is_fsdp_enabled" in inspect.getsource(getattr(Trainer, name)), name
    assert "self.accelerator.backward(" in inspect.getsource(Trainer.training_step)


# accelerate


@pytest.mark.skipif(Version(accelerate.__version__) < Version("1.11"), reason="it has not, there")
def test_accelerate_no_longer_leaves_whole_what_fsdp2_is_told_to_ignore():
    """`trainer.engines.keep_whole`; what comes of it is in test_sharded."""
    plugin = {field.name for field in fields(FullyShardedDataParallelPlugin)}
    assert {"fsdp_version", "ignored_modules", "cpu_ram_efficient_loading", "activation_checkpointing"} <= plugin
    assert "fsdp2_plugin.ignored_modules" in inspect.getsource(fsdp2_prepare_model)


def test_accelerate_wraps_an_optimizer_otherwise(recorded):
    """`optimizer_state.unwrapped`, `adapt._unscale`: state and groups are those of the optimizer inside."""
    _, recorder = recorded
    optimizer = recorder.optimizer
    assert isinstance(optimizer, AcceleratedOptimizer) and isinstance(optimizer.optimizer, torch.optim.Optimizer)
    assert optimizer.state is optimizer.optimizer.state and optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.scaler is None


# torch


def test_ddp_forgets_hooks_or_cannot_be_made_anew(tmp_path):
    """`distributed.wrap_again` runs the constructor of a wrapper once more; test_data_parallel has it train."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), static_graph=True, bucket_cap_mb=7)
        for name in ("process_group", "find_unused_parameters", "gradient_as_bucket_view", "static_graph"):
            assert hasattr(wrapper, name), name
        assert wrapper._comm_hooks == [] and wrapper.bucket_bytes_cap == 7 * 1024**2
        wrapper.module.weight = nn.Parameter(torch.ones(2, 2))
        wrapper.__init__(wrapper.module, static_graph=True)
        assert any(parameter is wrapper.module.weight for parameter in wrapper.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_torch_no_longer_tells_that_a_backward_pass_runs():
    """`input_energy` does not count what checkpointing computes again."""
    tasks = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: tasks.append(torch._C._current_graph_task_id()))
    y.backward()
    assert torch._C._current_graph_task_id() == -1 and tasks[0] != -1


def test_torch_keeps_the_hooks_of_a_parameter_elsewhere():
    """`factors.successor` hands them on."""
    parameter, calls = nn.Parameter(torch.ones(2)), []
    parameter.register_hook(lambda gradient: calls.append("before"))
    parameter.register_post_accumulate_grad_hook(lambda of: calls.append("after"))
    new: Any = nn.Parameter(torch.ones(3))
    new._backward_hooks, new._post_accumulate_grad_hooks = (
        parameter._backward_hooks,
        parameter._post_accumulate_grad_hooks,  # type: ignore[attr-defined]
    )
    new.sum().backward()
    assert calls == ["before", "after"]


def test_torch_saves_and_loads_a_module_by_other_methods():
    """`lora.factors` shows the product of A and E as the weight of its slot."""

    class Slot(nn.Module):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "weight"] = torch.ones(2)

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            self.read = state_dict[prefix + "weight"]

    whole = nn.ModuleDict({"slot": Slot()})
    assert list(whole.state_dict()) == ["slot.weight"]
    whole.load_state_dict({"slot.weight": torch.zeros(3)})
    assert whole["slot"].read.shape == (3,)


def test_torch_compile_marks_models_or_ranks_otherwise():
    """`allocate.rank_allocator`: ranks are marked as dynamic."""
    import torch._dynamo

    assert hasattr(torch._dynamo.config, "force_parameter_static_shapes")
    parameter = nn.Parameter(torch.ones(3, 2))
    torch._dynamo.mark_dynamic(parameter, 0)
    assert all(
        "dynamo" in name or name == "_specialize_on" for name in parameter.__dict__
    )  # what `successor` leaves out
    module = nn.Linear(2, 2)
    assert torch.compile(module, backend="eager")._orig_mod is module
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None


def test_torch_has_no_operations_over_lists_of_tensors():
    """Scores use `torch._foreach_*`, as torch's own optimizers do."""
    tensors: list[Tensor] = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert [float(norm) for norm in torch._foreach_norm(tensors)] == [5.0, 1.0]
    assert [float(norm) for norm in torch._foreach_norm(tensors, 1)] == [7.0, 1.0]
    assert torch._foreach_mul(tensors, tensors)[1].item() == 1.0
    torch._foreach_zero_(tensors)
    assert not tensors[0].any()

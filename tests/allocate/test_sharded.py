"""A base that is cut over processes, by FSDP2 or tensor parallelism: ranks and weights are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from test_data_parallel import NARROW, PAPER, assert_the_same_decisions, ending, flat, given
from together import can_fork, together
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from pedyra import RankAllocator
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.distributed import average_gradients

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
STEPS = 24


def llama(**settings: Any) -> Any:
    torch.manual_seed(3)
    shape: Any = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=16))
    return get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", **settings))


def sharded(model: Any) -> None:
    """In place, docs/scaling.md's way: what is trained stays whole, everything else is cut, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)


def by_fully_shard(rank: int, size: int, settings: dict[str, Any], folder: str = "", resume: bool = False) -> Any:
    model = llama()
    if size > 1:
        dist.init_process_group("gloo")
        sharded(model)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert all(isinstance(parameter, DTensor) for parameter in frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.5)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, **given(settings))
    if resume:
        restore(allocator, Path(folder))
        moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # of the ranks that were restored
        checkpoint.load(moments, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, moments["optimizer"])
    for step in range(allocator.step, STEPS):
        rows = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        model(input_ids=rows, labels=rows).loss.backward()
        average_gradients(model.parameters())
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        allocator.after_step()
        if folder and not resume and step + 1 == 16:
            if rank == 0:
                model.save_pretrained(folder)
                save_state(allocator, Path(folder))
            checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    return ending(model, allocator)


@pytest.mark.parametrize("settings", [NARROW, PAPER], ids=["narrow", "paper"])
def test_fully_shard_trains_as_one_process_and_resumes_in_another_number(settings, tmp_path):
    folder = str(tmp_path / "checkpoint")
    (alone,) = together(by_fully_shard, 1, settings)
    first, second = together(by_fully_shard, 2, settings, folder)
    assert first == second
    assert_the_same_decisions(first, alone)
    assert flat(first["updates"]) == pytest.approx(flat(alone["updates"]), abs=1e-6)
    (resumed,) = together(by_fully_shard, 1, settings, folder, True)
    assert_the_same_decisions(resumed, first)
    assert flat(resumed["updates"]) == pytest.approx(flat(first["updates"]), abs=1e-6)
    # The adapter beside it is an ordinary LoRA.
    PeftModel.from_pretrained(llama().unload(), folder)


def by_tensor_parallel(rank: int, size: int, settings: dict[str, Any]) -> Any:
    """Every process sees the whole batch; the base's weights are cut by rows and columns."""
    model = llama()
    if size > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (size,))
        column, row = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
        for name, module in list(model.named_modules()):
            if name.endswith("base_layer"):
                parallelize_module(module, mesh, row if "down" in name or "o_proj" in name else column)
        weights = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
        assert all(isinstance(weight, DTensor) for weight in weights)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.5)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, **given(settings))
    for step in range(STEPS):
        rows = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(step))
        model(input_ids=rows, labels=rows).loss.backward()
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        allocator.after_step()
    return ending(model, allocator)


def test_a_base_in_tensor_parallel_trains_as_one_process():
    (alone,) = together(by_tensor_parallel, 1, PAPER)
    first, second = together(by_tensor_parallel, 2, PAPER)
    assert first == second
    assert_the_same_decisions(first, alone)
    assert flat(first["updates"]) == pytest.approx(flat(alone["updates"]), abs=1e-6)


def refusals(rank: int, size: int) -> list[str]:
    dist.init_process_group("gloo")
    told = []
    mesh = init_device_mesh("cpu", (size,))
    for case in ("whole", "pissa", "tensor parallel"):
        model = llama(**({"init_lora_weights": "pissa"} if case == "pissa" else {}))
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        if case == "tensor parallel":  # as PEFT splits the B of a layer whose base is split by columns
            layer = model.base_model.model.model.layers[1].mlp.up_proj
            parallelize_module(layer.lora_B["default"], mesh, ColwiseParallel())
        else:
            fully_shard(model, mesh=mesh, ignored_params=trained if case == "pissa" else None)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        try:
            RankAllocator(model, optimizer, total_steps=STEPS, **given(PAPER))
        except ValueError as error:
            told.append(str(error))
    return told


def test_sharded_factors_are_refused_by_name():
    for whole, pissa, parallel in together(refusals, 2):
        assert "lora_B of model.layers.1.mlp.up_proj is cut into shards" in parallel
        assert "lora_A of model.layers.0.self_attn.q_proj is cut into shards" in whole
        assert "fully_shard(..., ignored_params=)" in whole and len(whole) < 300
        assert "a part of its weight, which is" in pissa and "(DTensor)" in pissa and len(pissa) < 300

"""A base that is cut over processes, by FSDP2 or tensor parallelism: ranks and weights are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from fsdp2 import cut_on_cpu
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from test_data_parallel import PAPER, assert_the_same_decisions, ending, flat, given
from together import can_fork, together
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from windows import take_step, trainable
from works_with import note

from pedyra import RankAllocator, adapt
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.distributed import average_gradients

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
STEPS = 24


def llama(**settings: Any) -> Any:
    torch.manual_seed(3)
    shape: Any = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=16))
    return get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", **settings))


def sharded(model: Any) -> None:
    """Cut the model in place as docs/processes.md says: what is trained stays whole, the rest goes layer by layer."""
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
    optimizer = torch.optim.SGD(trainable(model), lr=0.2, momentum=0.5)
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
        take_step(allocator)
        if folder and not resume and step + 1 == 16:
            if rank == 0:
                model.save_pretrained(folder)
                save_state(allocator, Path(folder))
            checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    return ending(model, allocator)


def test_fully_shard_trains_as_one_process_and_resumes_in_another_number(tmp_path):
    folder = str(tmp_path / "checkpoint")
    (alone,) = together(by_fully_shard, 1, PAPER)
    first, second = together(by_fully_shard, 2, PAPER, folder)
    assert first == second
    assert_the_same_decisions(first, alone)
    assert flat(first["updates"]) == pytest.approx(flat(alone["updates"]), abs=1e-6)
    (resumed,) = together(by_fully_shard, 1, PAPER, folder, True)
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
    optimizer = torch.optim.SGD(trainable(model), lr=0.2, momentum=0.5)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, **given(settings))
    for step in range(STEPS):
        rows = torch.randint(0, 40, (8, 10), generator=torch.Generator().manual_seed(step))
        model(input_ids=rows, labels=rows).loss.backward()
        take_step(allocator)
    return ending(model, allocator)


@pytest.mark.skipif(TORCH < (2, 11), reason="below torch 2.11 plain LoRA on such a base ends elsewhere on gloo, too")
def test_a_base_in_tensor_parallel_trains_as_one_process():
    (alone,) = together(by_tensor_parallel, 1, PAPER)
    first, second = together(by_tensor_parallel, 2, PAPER)
    assert first == second
    assert_the_same_decisions(first, alone)
    assert flat(first["updates"]) == pytest.approx(flat(alone["updates"]), abs=1e-6)


needs_ignored = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.11"), reason="accelerate cuts what it is told to leave whole"
)


def fsdp2_trainer(
    model: Any, out: str, callbacks: list[Any], size: int = 2, fsdp: Any = None, **arguments: Any
) -> Trainer:
    """Steps of eight rows in two micro-batches, clipped."""
    cut_on_cpu()
    draw = torch.Generator().manual_seed(7)
    rows: Any = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (64, 10), generator=draw)]
    if size > 1:
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, **(fsdp or {})}, "ddp_backend": "gloo"}
    settings = TrainingArguments(
        out, max_steps=STEPS, per_device_train_batch_size=4 // size, gradient_accumulation_steps=2, max_grad_norm=0.1,
        learning_rate=0.2, lr_scheduler_type="constant", report_to="none", save_steps=8, logging_steps=6, seed=5,
        use_cpu=True, disable_tqdm=True, **arguments,
    )  # fmt: skip
    sgd: Any = torch.optim.SGD, {"lr": 0.2, "momentum": 0.5}
    return Trainer(
        model, settings, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks, optimizer_cls_and_kwargs=sgd
    )


def by_trainer(rank: int, size: int, settings: dict[str, Any], out: str, resume: str | None = None) -> dict[str, Any]:
    model = llama()
    trainer = fsdp2_trainer(model, out, [], size)
    callback = adapt(trainer, given(settings)["config"])
    trainer.train(resume_from_checkpoint=resume)
    cut = [isinstance(parameter, DTensor) for parameter in model.parameters() if not parameter.requires_grad]
    assert all(cut) if size > 1 else not any(cut)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert min(norms) > 0.1, "nothing is clipped: it proves nothing"
    assert callback.allocator is not None
    return ending(model, callback.allocator) | {"norms": norms}


@needs_ignored
@pytest.mark.parametrize("others", [2, 1])
def test_trainers_fsdp2_trains_as_one_process_and_resumes(others, tmp_path):
    out = str(tmp_path / "two")
    (alone,) = together(by_trainer, 1, PAPER, str(tmp_path / "one"))
    first, second = together(by_trainer, 2, PAPER, out)
    assert first == second
    assert_the_same_decisions(first, alone)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert flat(first["updates"]) == pytest.approx(flat(alone["updates"]), abs=1e-6)
    resumed, *_ = together(by_trainer, others, PAPER, out, f"{out}/checkpoint-16")
    if others == 2:
        assert resumed["weights"] == first["weights"]
    else:  # without FSDP
        assert flat(resumed["updates"]) == pytest.approx(flat(first["updates"]), abs=1e-6)
    why = "refused: run `pedyra fit FOLDER`"
    resumes = "the same bits" if others == 2 else "the same to 1e-6, in one process"
    note("engine", "FSDP2 in a Trainer, two processes", ranks="move", resume=resumes, fit=why)


def trained_twice(rank: int, size: int, out: str) -> Any:
    """From another start in each process, with evaluations; the "best", of the highest loss, then what comes of it."""
    base = llama().unload()
    torch.manual_seed(rank)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear"))
    trainer = fsdp2_trainer(
        model, out, [], eval_strategy="steps", eval_steps=8, load_best_model_at_end=True, greater_is_better=True
    )
    callback = adapt(trainer, given(PAPER)["config"])
    trainer.train()
    assert trainer.state.best_model_checkpoint == f"{out}/checkpoint-8" and callback.allocator is not None
    best = ending(model, callback.allocator)["weights"]
    trainer.save_model(f"{out}/best")
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return best, ending(model, callback.allocator)


@needs_ignored
def test_trainers_fsdp2_evaluates_brings_back_the_best_and_trains_on(tmp_path):
    first, second = together(trained_twice, 2, str(tmp_path))
    assert first == second
    best = PeftModel.from_pretrained(llama().unload(), tmp_path / "best")  # an ordinary LoRA
    assert [value.flatten().tolist() for name, value in best.state_dict().items() if "lora" in name] == first[0]
    assert 0 in first[1]["history"][-1]["ranks"].values(), "no layer is empty: accelerate finds them all"


def told_by_trainer(rank: int, size: int, out: str) -> dict[str, str]:
    told = {}
    cases: dict[str, dict[str, Any]] = {
        "loading": {"fsdp": {"cpu_ram_efficient_loading": True}},
        "checkpointing": {"fsdp": {"activation_checkpointing": True}},
        "compile": {"torch_compile": True},
        "pissa": {},
        "head": {},
    }
    for case, arguments in cases.items():
        torch.manual_seed(3)
        lora: dict[str, Any] = {"init_lora_weights": "pissa"} if case == "pissa" else {}
        targets = ["q_proj", "lm_head"] if case == "head" else "all-linear"
        model = get_peft_model(llama().unload(), LoraConfig(r=3, target_modules=targets, **lora))
        try:
            trainer = fsdp2_trainer(model, out, [], **arguments)
            adapt(trainer, given(PAPER)["config"])
            trainer.train()
        except ValueError as error:
            told[case] = str(error)
    return told


@needs_ignored
def test_what_trainers_fsdp2_cannot_do_is_told_before_training(tmp_path):
    expected = {
        "loading": "cpu_ram_efficient_loading, which cuts the adapter too; set it to false in fsdp_config",
        "checkpointing": "activation_checkpointing in fsdp_config, whose names PEFT does not save; set gradient_",
        "compile": "torch_compile; leave it out",
        "pissa": "a start that takes from the base weight",
        "head": "an adapter of lm_head, whose weight PEFT would save; leave it out of target_modules",
    }
    for told in together(told_by_trainer, 2, str(tmp_path)):
        assert told.keys() == expected.keys()
        for case, message in expected.items():
            assert message in told[case] and len(told[case]) < 300


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
        optimizer = torch.optim.SGD(trainable(model), lr=0.5)
        try:
            RankAllocator(model, optimizer, total_steps=STEPS, **given(PAPER))
        except ValueError as error:
            told.append(str(error))
    return told


def test_sharded_factors_are_refused_by_name():
    for whole, pissa, parallel in together(refusals, 2):
        assert "lora_B of model.layers.1.mlp.up_proj is sharded" in parallel
        assert "lora_A of model.layers.0.self_attn.q_proj is sharded" in whole
        assert "fully_shard(..., ignored_params=)" in whole and len(whole) < 300
        assert "a part of its weight, which is" in pissa and "(DTensor)" in pissa and len(pissa) < 300

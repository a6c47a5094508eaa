"""Two processes on halves of every batch, their gradients averaged, decide what one process on the whole batch does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pedyra import RankAllocator, RankConfig
sys.path.insert(0, sys.argv[5])
from windows import pedyra


def given(settings):
    return {"config": RankConfig.scored(**settings)} if "alpha" in settings else pedyra(**settings)



port, rank, size, settings = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
torch.manual_seed(1)
base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 6))
teacher = torch.randn(8, 6)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))
trained = [p for p in model.parameters() if p.requires_grad]
if settings.get("reassignment"):  # goes by Adam's second moments
    optimizer = torch.optim.Adam(trained, lr=0.01)
else:  # of SGD a difference of a rounding stays one; Adam makes a step of it where a gradient is nearly zero
    optimizer = torch.optim.SGD(trained, lr=0.2, momentum=0.5)
allocator = RankAllocator(model, optimizer, total_steps=24, **given(settings))
wrapped = DistributedDataParallel(model) if size > 1 else model
for step in range(24):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    part = x.chunk(size)[rank]
    (wrapped(part) - torch.tanh(part @ teacher)).square().mean().backward()
    allocator.before_step()
    optimizer.step()
    optimizer.zero_grad()
    record = allocator.after_step()
    if size > 1 and record and (record["pruned"] or record["added"]):
        wrapped = DistributedDataParallel(model)
weights = [value.flatten().tolist() for name, value in model.state_dict().items() if "lora" in name]
kept = ("step", "reassigned", "ranks", "pruned", "added", "scores", "gains", "trials")
print(json.dumps({"weights": weights, "history": [{k: r.get(k) for k in kept} for r in allocator.history]}), flush=True)
import os
# As Python ends, the thread of gloo's last work may want the GIL to drop a reference; it is then ended by force, which
# C++ answers with an abort.
os._exit(0)
"""
TRAINER = """
import json, os, sys
port, rank, size, settings = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
out, resume = settings.pop("out"), settings.pop("resume")
if size > 1:  # as torchrun does
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ |= dict(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from pedyra import RankCallback, RankConfig
sys.path.insert(0, sys.argv[5])
from windows import pedyra


def given(settings):
    return {"config": RankConfig.scored(**settings)} if "alpha" in settings else pedyra(**settings)



torch.set_num_threads(1)
torch.manual_seed(2)
shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
base = BertForSequenceClassification(
    BertConfig(**shape, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
)
model = get_peft_model(base, LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value", "dense"]))
draw = torch.Generator().manual_seed(7)
tokens = [torch.randint(3, 40, (6,), generator=draw) for _ in range(64)]
rows = [dict(input_ids=row, attention_mask=torch.ones_like(row), labels=int(row[0] > 20)) for row in tokens]
arguments = TrainingArguments(
    out, max_steps=24, per_device_train_batch_size=8 // size, learning_rate=0.5, optim="sgd", use_cpu=True,
    lr_scheduler_type="constant", max_grad_norm=1.0, report_to="none", save_steps=11, logging_steps=5, seed=5,
    disable_tqdm=True, ddp_backend="gloo" if size > 1 else None,
    average_tokens_across_devices=False,  # with it Trainer doubles the loss of a classifier
)
callback = RankCallback(record_to=f"{out}/ranks.jsonl", **given(settings))
Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(
    resume_from_checkpoint=f"{out}/checkpoint-11" if resume else None
)
weights = [value.flatten().tolist() for name, value in model.state_dict().items() if "lora" in name]
kept = ("step", "ranks", "pruned", "added", "scores", "gains", "trials")
history = [{k: r.get(k) for k in kept} for r in callback.allocator.history]
print(json.dumps({"weights": weights, "history": history}), flush=True)
os._exit(0)  # as above
"""
TESTS = str(Path(__file__).parents[1])
TRIALS: dict[str, Any] = dict(interval=6, final_warmup=3, moves=4, certainty=0.0, margin=1e-3, reassignment=0)
DEAL: dict[str, Any] = dict(interval=6, final_warmup=3, reassignment=6)
PAPER: dict[str, Any] = {**dict(interval=4, initial_warmup=2, final_warmup=6, moves=3, budget="ranks"), "alpha": 0.5}
PAPER |= dict(min_rank=0, start="lora", orth_weight=0.0)


def run(size: int, settings: dict[str, Any], folder: Path, worker: str = WORKER) -> list[dict[str, Any]]:
    """What each process ends with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "worker.py"
    script.write_text(worker)
    commands = [
        [
            sys.executable,
            "-W",
            "ignore",
            str(script),
            str(port),
            str(rank),
            str(size),
            json.dumps(settings),
            str(Path(__file__).parents[1]),
        ]
        for rank in range(size)
    ]
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)  # a machine's own name may lead nowhere
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": loopback} if loopback else {})
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for c in commands
    ]
    ended = [process.communicate(timeout=240) for process in running]
    for process, (_, error) in zip(running, ended, strict=True):
        assert process.returncode == 0, error[-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def assert_the_same_decisions(together: dict[str, Any], alone: dict[str, Any]) -> None:
    assert sum(sum(record["added"].values()) for record in alone["history"]) > 0, "nothing moved: it proves nothing"
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        for key in ("step", "ranks", "added"):
            assert ours[key] == theirs[key]
        for key in ("scores", "gains", "trials"):
            assert flat(ours[key]) == pytest.approx(flat(theirs[key]), rel=2e-3, abs=1e-5)
    assert flat(together["weights"]) == pytest.approx(flat(alone["weights"]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("settings", [TRIALS, PAPER], ids=["trials", "paper"])
def test_two_processes_decide_as_one_does_on_the_whole_batch(settings, tmp_path):
    (alone,) = run(1, settings, tmp_path)
    first, second = run(2, settings, tmp_path)
    assert first == second  # to the last bit
    assert_the_same_decisions(first, alone)


def test_two_processes_deal_the_same_ranks_as_one_does(tmp_path):
    (alone,) = run(1, DEAL, tmp_path)
    first, second = run(2, DEAL, tmp_path)
    assert first == second
    (ours, *_), (theirs, *_) = first["history"], alone["history"]
    assert ours["reassigned"] and ours["step"] == 6 and sum(ours["added"].values()) > 0
    assert ours["ranks"] == theirs["ranks"]
    assert flat(ours["scores"]) == pytest.approx(flat(theirs["scores"]), rel=1e-3)


def test_a_trainer_of_two_processes_trains_as_one_and_resumes(tmp_path):
    settings: Any = lambda name, resume=False: {**TRIALS, "out": str(tmp_path / name), "resume": resume}  # noqa: E731
    (alone,) = run(1, settings("one"), tmp_path, TRAINER)
    first, second = run(2, settings("two"), tmp_path, TRAINER)
    assert first == second
    assert_the_same_decisions(first, alone)
    record = (tmp_path / "two" / "ranks.jsonl").read_text()
    assert len(record.splitlines()) == len((tmp_path / "one" / "ranks.jsonl").read_text().splitlines())  # one writer
    resumed, _ = run(2, settings("two", resume=True), tmp_path, TRAINER)
    assert resumed["weights"] == first["weights"]
    assert (tmp_path / "two" / "ranks.jsonl").read_text().count("adjustment") == record.count("adjustment")

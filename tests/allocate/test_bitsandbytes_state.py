"""bitsandbytes' own optimizers, on a CPU: averages in bytes, pages or floats move with the triples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import close, same_bits
from peft import PeftModel
from torch import Tensor, nn
from windows import forced, trainable

from pedyra import RankAllocator, attach
from pedyra.allocate.checkpoint import restore, save_state
from pedyra.allocate.optimizer_state import check_optimizer, check_state, drop_unfit_state, move_state
from pedyra.lora.replacement import Replacement

# What bitsandbytes says without a GPU: of its import, and that a processor has no pages.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

bnb: Any = pytest.importorskip("bitsandbytes")

BYTES = ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "RMSprop8bit"]
FLOATS = ["AdamW32bit", "PagedAdamW32bit", "Lion32bit", "PagedLion32bit"]


def stepped(kind: str, shape: tuple[int, int], steps: int = 3) -> tuple[Any, nn.Parameter]:
    """An optimizer after a few steps of gradients whose rows differ in size, and its only parameter."""
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = getattr(bnb.optim, kind)([parameter], lr=1e-3)
    for _ in range(steps):
        parameter.grad = torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None]
        optimizer.step()
    return optimizer, parameter


def without(parameter: Tensor, kept: list[int], dim: int, num_new: int = 0) -> Replacement:
    rows = parameter.detach().index_select(dim, torch.tensor(kept))
    fresh = torch.zeros([num_new if i == dim else size for i, size in enumerate(rows.shape)])
    return Replacement(parameter, nn.Parameter(torch.cat([rows, fresh], dim)), dim, torch.tensor(kept), num_new)


def numbers(state: dict[str, Any], key: str) -> Tensor:
    """Looked up in bitsandbytes' table by hand, each times the largest of its 256."""
    packed = state[key]
    if packed.dtype != torch.uint8:
        return packed.clone()
    largest = state[f"absmax{key[-1]}"].repeat_interleave(256)[: packed.numel()]
    return state[f"qmap{key[-1]}"][packed.flatten().long()].mul(largest).view(packed.shape)


def step_of(values: Tensor, table: Tensor) -> Tensor:
    """Element by element, how far apart the two numbers are between which it lies, in blocks of 256 of this table."""
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % 256)).view(-1, 256)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    above = torch.searchsorted(table, (flat / largest).contiguous()).clamp(1, len(table) - 1)
    steps = (table[above] - table[above - 1]) * largest
    return steps.flatten()[: values.numel()].view(values.shape)


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize(("shape", "dim"), [((18, 320), 0), ((320, 18), 1), ((18, 512), 0)], ids=["A", "B", "aligned"])
def test_the_state_of_kept_rows_differs_by_the_quantisation_step_alone(kind, shape, dim):
    optimizer, old = stepped(kind, shape)
    check_optimizer(optimizer)
    kept = [i for i in range(shape[dim]) if i not in (1, 7)]
    before = {key: numbers(optimizer.state[old], key) for key in ("state1", "state2") if key in optimizer.state[old]}
    change = without(old, kept, dim)
    check_state(optimizer, [old])
    move_state(optimizer, [change])
    state = optimizer.state[change.new]
    assert old not in optimizer.state and state["step"] == 3
    for key, was in before.items():
        wanted = was.index_select(dim, torch.tensor(kept))
        assert state[key].dtype == torch.uint8 and state[key].shape == change.new.shape
        error = (numbers(state, key) - wanted).abs()
        assert bool((error <= 1.001 * step_of(wanted, state[f"qmap{key[-1]}"])).all())
        assert float(wanted.abs().max()) > 10 * float(error.max())
    change.new.grad = torch.randn(change.new.shape)
    optimizer.step()
    assert bool(change.new.isfinite().all())


@pytest.mark.parametrize("kind", FLOATS)
def test_the_state_in_floats_moves_to_the_last_bit(kind):
    optimizer, old = stepped(kind, (18, 320))
    check_optimizer(optimizer)
    before = {key: value.clone() for key, value in optimizer.state[old].items() if isinstance(value, Tensor)}
    change = without(old, [0, 5, 17], 0)
    move_state(optimizer, [change])
    assert before and all(same_bits(optimizer.state[change.new][key], was[[0, 5, 17]]) for key, was in before.items())


@pytest.mark.parametrize("kind", ["AdamW32bit", "Lion32bit", "RMSprop32bit", "Adagrad32bit"])
def test_where_b_is_divided_averages_are_those_of_the_larger_gradients(kind):
    old, other = nn.Parameter(torch.zeros(18, 320)), nn.Parameter(torch.zeros(18, 320))
    optimizer, larger = (getattr(bnb.optim, kind)([parameter], lr=1e-3) for parameter in (old, other))
    for _ in range(3):
        old.grad = torch.randn(old.shape)
        other.grad = 4 * old.grad
        optimizer.step()
        larger.step()
    new = nn.Parameter(old.detach() / 4)
    move_state(optimizer, [Replacement(old, new, 0, torch.arange(18), 0, divisor=4.0)])
    averages = {key: value for key, value in larger.state[other].items() if key in ("state1", "state2")}
    assert averages and all(close(optimizer.state[new][key], value) for key, value in averages.items())


@pytest.mark.parametrize("kind", BYTES)
def test_a_parameter_that_crosses_4096_elements_gets_the_state_that_bitsandbytes_makes(kind):
    optimizer, old = stepped(kind, (16, 300))  # 4,800 elements
    was = numbers(optimizer.state[old], "state1")
    down = without(old, [*range(12)], 0)  # 3,600
    move_state(optimizer, [down])
    assert same_bits(optimizer.state[down.new]["state1"], was[:12])
    assert optimizer.state[down.new].keys() == stepped(kind, (12, 300))[0].state.popitem()[1].keys()
    up = without(down.new, [*range(12)], 0, num_new=4)
    move_state(optimizer, [up])
    state = optimizer.state[up.new]
    made = stepped(kind, (16, 300))[0].state.popitem()[1]
    assert {k: getattr(v, "dtype", v) for k, v in state.items()} == {k: getattr(v, "dtype", v) for k, v in made.items()}
    assert torch.allclose(numbers(state, "state1")[:12], was[:12], atol=0.02)
    assert numbers(state, "state1")[12:].abs().max() < 1e-3 * was.max()  # in a block with others zero is not quite zero
    optimizer.step()
    up.new.grad = torch.ones_like(up.new)
    optimizer.step()


def test_pages_are_left_where_they_are_and_the_new_state_is_in_ordinary_memory():
    """bitsandbytes never frees a page. A processor has none: the mark that it puts on them stands for one."""
    optimizer, old = stepped("PagedAdamW8bit", (18, 320))
    optimizer.state[old]["state1"].is_paged = True
    change = without(old, [*range(16)], 0)
    move_state(optimizer, [change])
    assert optimizer.is_paged and not getattr(optimizer.state[change.new]["state1"], "is_paged", False)


def test_the_state_of_a_loaded_parameter_of_the_same_shape_is_kept():
    optimizer, parameter = stepped("AdamW8bit", (16, 320))
    drop_unfit_state(optimizer, [parameter])
    assert parameter in optimizer.state
    parameter.data = parameter.data[:8]
    drop_unfit_state(optimizer, [parameter])
    assert parameter not in optimizer.state


def test_a_rank_of_zero_is_resumed_in_a_loop_of_ones_own(make_net, train_net, tmp_path):
    """bitsandbytes loads a state without the hooks by which a rank 0, one zero row on disk, is none again."""
    model = make_net(r=1, trained=True)
    optimizer = bnb.optim.AdamW8bit(trainable(model), lr=1e-2)
    settings = forced(min_rank=0, interval=2, initial_warmup=1, final_warmup=3, moves=1)
    allocator = RankAllocator(model, optimizer, total_steps=12, **settings)
    train_net(model, optimizer, allocator, 5)
    assert 0 in allocator.ranks.values()
    model.save_pretrained(tmp_path)
    save_state(allocator, tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    train_net(model, optimizer, allocator, 3, first=6)

    again: Any = PeftModel.from_pretrained(make_net(r=1).unload(), tmp_path, is_trainable=True)
    attach(again, start="lora")
    of_its_own = bnb.optim.AdamW8bit(trainable(again), lr=1e-2)
    resumed = RankAllocator(again, of_its_own, total_steps=12, **settings)
    of_its_own.load_state_dict(saved)
    restore(resumed, tmp_path)
    train_net(again, of_its_own, resumed, 3, first=6)
    assert resumed.ranks == allocator.ranks

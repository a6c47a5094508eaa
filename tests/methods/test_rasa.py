"""RaSA: private and shared ranks by slow loops, the pool owned once, and plain LoRA of rank r - k + kL at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel

from pedyra.lora.attach import attach
from pedyra.methods.rasa import Pools, by_type


def shared(make_bert: Any, trained: bool = True) -> tuple[Any, list[Any]]:
    model = make_bert(r=3, lora_alpha=6, target_modules=["query", "value"])
    layers = Pools(model).layers
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("pool_B"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model, layers


def test_the_update_by_slow_loops(make_bert):
    _, layers = shared(make_bert)
    queries = [layer for layer in layers if layer.name.endswith("query")]
    owner = queries[0].a.owner
    for layer in queries:
        A, B, d = layer.a.A, layer.b.B, layer.a.d.flatten()
        delta = torch.zeros(16, 16)
        for i in range(2):
            delta += d[i] * torch.outer(B[:, i], A[i])
        for i in range(2):
            delta += d[2 + i] * torch.outer(owner.pool_B[:, i], owner.pool_A[i])
        torch.testing.assert_close(layer.module.get_delta_weight("default"), delta)


def test_alpha_is_split_in_half_and_averaged_within_each_half(make_bert):
    model = make_bert(r=3, lora_alpha=6, target_modules=["query", "value"])
    layers: list[Any] = Pools(model).layers
    for layer in layers:
        # Private: 0.5 * 6 / (3 - 1); shared by two layers: 0.5 * 6 / (1 * 2).
        assert layer.a.d.flatten().tolist() == [1.5, 1.5, 1.5, 1.5]
        assert layer.scaling == 1
    layers = Pools(make_bert(r=4, lora_alpha=12, target_modules=["query"])).layers
    for layer in layers:
        assert layer.a.d.flatten().tolist() == [2, 2, 2, 3, 3]


def test_the_start_is_the_base_model_and_b_learns_first(make_bert, tokens):
    model, layers = shared(make_bert, trained=False)
    model.eval()
    logits = model(**tokens).logits
    with model.disable_adapter():
        torch.testing.assert_close(logits, model(**tokens).logits)
    logits.square().sum().backward()
    owner = layers[0].a.owner
    assert layers[0].b.B.grad.any() and owner.pool_B.grad.any()
    assert not layers[0].a.A.grad.any() and not owner.pool_A.grad.any() and not layers[0].a.d.grad.any()


def test_pools_are_once_in_the_state_dict_and_the_optimizer(make_bert):
    model, layers = shared(make_bert)
    pools = [name for name in model.state_dict() if ".pool_" in name]
    assert len(pools) == 4  # A and B of query and of value
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    # L r (in + out) for each type, as LoRA has, and L (r - k + k L) more.
    assert sum(p.numel() for p in factors) == 2 * (2 * 3 * 32 + 2 * 4)
    assert len({id(p) for p in factors}) == len(factors)
    assert len(layers) == 4


def test_a_copied_model_shares_its_own_pools(make_bert):
    _, layers = copy.deepcopy(shared(make_bert))
    one, other = [layer for layer in layers if layer.name.endswith("query")]
    assert one.a is one.a.owner is other.a.owner is other.b._owner[0]


@pytest.mark.parametrize("names", [("layers.{}.q", "h.{}.q"), ("model.layer.{}.q", "{}.q")])
def test_types_are_names_without_their_numbers(make_net, names: tuple[str, ...]):
    layers = attach(make_net())
    same = [copy.copy(layers[2]) for _ in range(4)]
    for layer, name in zip(same, [names[0].format(0), names[0].format(11), names[1].format(3), "q8.q"], strict=True):
        object.__setattr__(layer, "name", name)
    assert [[layer.name for layer in layers] for layers in by_type(same)] == [
        [names[0].format(0), names[0].format(11)],
        [names[1].format(3)],
        ["q8.q"],
    ]
    # Net's layers 0, 1 and 2 have the same name but for the number, and three shapes.
    assert [len(layers) for layers in by_type(layers)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_what_is_saved_is_plain_lora_of_the_exact_rank(prepare, make_base, tmp_path, kind: str):
    run = prepare("rasa", kind)
    end, run.work.end = run.work.end, lambda: None
    run.trainer.train()
    before, expected = run.model.get_nb_trainable_parameters()[0], run.logits()
    lora = prepare("lora", kind).model.get_nb_trainable_parameters()[0]
    end()
    run.model.save_pretrained(tmp_path)
    base, _, _ = make_base(run.recipe)
    loaded: Any = PeftModel.from_pretrained(base, tmp_path).eval()
    ranks = [module.r["default"] for module in loaded.modules() if hasattr(module, "lora_A")]
    blocks = base.config.num_hidden_layers
    # All types are in every block, but for BERT's pooler: alone of its type, it shares with no one.
    assert set(ranks) <= {4 - 1 + blocks, 4} and ranks.count(4 - 1 + blocks) == len(ranks) - ranks.count(4)
    assert before - lora == sum(ranks)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**run.batch()).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_function(make_bert, tokens):
    model = make_bert(r=3, target_modules=["query", "value"])
    work = Pools(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("pool_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    with torch.no_grad():
        expected = model(**tokens).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**tokens).logits, expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        work.end()
        torch.testing.assert_close(model(**tokens).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(**tokens).logits, expected, rtol=1e-4, atol=1e-5)

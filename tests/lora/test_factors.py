"""The A slot and the B slot: an ordinary LoRA's weight outside, triples inside, any rank on loading."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import same_bits
from torch import nn

from pedyra.lora.attach import attach, train_e
from pedyra.lora.factors import AFactor, BFactor
from pedyra.lora.start import Start


def a_factor(rank: int = 3, width: int = 5) -> AFactor:
    return AFactor(nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.randn(rank)))


def b_factor(rank: int = 3, width: int = 4) -> BFactor:
    return BFactor(nn.Parameter(torch.randn(width, rank)))


def test_a_is_linear_then_scaled_by_e():
    a, x = a_factor(), torch.randn(2, 7, 5)
    expected = torch.stack([(x @ a.A[i]) * a.E[i] for i in range(3)], dim=-1)
    assert torch.allclose(a(x), expected, atol=1e-6)


def test_the_gradients_of_a_and_e_are_those_of_the_triple_form():
    a, x = a_factor(), torch.randn(6, 5)
    upstream = torch.randn(6, 3)
    grad_A, grad_E = torch.autograd.grad(a(x), (a.A, a.E), upstream)
    outer = upstream.T @ x  # d / d (E A)
    assert torch.allclose(grad_A, a.E.detach()[:, None] * outer, atol=1e-5)
    assert torch.allclose(grad_E, (a.A.detach() * outer).sum(1), atol=1e-5)


def test_rank_zero_contributes_nothing_and_backpropagates():
    a, b, x = a_factor(0), b_factor(0), torch.randn(2, 5, requires_grad=True)
    out = b(a(x))
    assert torch.count_nonzero(out) == 0
    out.sum().backward()
    assert x.grad is not None and torch.count_nonzero(x.grad) == 0


def test_loading_into_the_meta_device_assigns():
    a = AFactor(nn.Parameter(torch.empty(3, 5, device="meta")), nn.Parameter(torch.empty(3, device="meta")))
    source = a_factor(2)
    a.load_state_dict(source.state_dict(), assign=True)
    assert a.A.device.type == "cpu" and same_bits(a.weight, source.weight)


def test_loading_keeps_dtype_and_trainability():
    a, b = a_factor().to(torch.bfloat16), b_factor().to(torch.bfloat16)
    for parameter in (*a.parameters(), *b.parameters()):
        parameter.requires_grad_(False)
    a.load_state_dict(a_factor(2).state_dict())
    b.load_state_dict(b_factor(2).state_dict())
    assert {p.dtype for p in (*a.parameters(), *b.parameters())} == {torch.bfloat16}
    assert not any(p.requires_grad for p in (*a.parameters(), *b.parameters()))


def test_loading_what_is_live_keeps_the_split_into_a_and_e():
    a, b = a_factor(), b_factor()
    before = a.A, a.E, b.weight
    a.load_state_dict(a.state_dict())
    b.load_state_dict(b.state_dict())
    assert (a.A, a.E, b.weight) == before or all(x is y for x, y in zip((a.A, a.E, b.weight), before, strict=True))


def test_the_wrong_width_is_refused_with_the_shape():
    with pytest.raises(RuntimeError, match=r"weight has \(3, 6\), not \(r, in\)"):
        a_factor(width=5).load_state_dict(a_factor(width=6).state_dict())
    with pytest.raises(RuntimeError, match=r"weight has \(7, 3\), not \(out, r\)"):
        b_factor(width=4).load_state_dict(b_factor(width=7).state_dict())


def started(rank: int) -> tuple[AFactor, BFactor]:
    """Slots of `rank` trained triples, of which two began as what PiSSA took from the weight."""
    a, b = AFactor(nn.Parameter(torch.randn(rank, 5)), nn.Parameter(torch.randn(rank))), b_factor(rank)
    a.start = b.start = Start(torch.randn(2, 5), torch.randn(4, 2))
    a.origin = torch.cat([a.start.A, torch.zeros(rank - 2, 5)])
    b.origin = torch.cat([a.start.B, torch.zeros(4, rank - 2)], 1)
    return a, b


def test_what_triples_began_as_is_beside_them_on_disk_and_is_taken_off_again():
    a, b = started(3)
    assert a.origin is not None and b.origin is not None
    live = b.weight.detach() @ a.weight.detach()
    on_disk = b.state_dict()["weight"] @ a.state_dict()["weight"]
    assert torch.allclose(on_disk, live - b.origin @ a.origin, atol=1e-5)
    a.load_state_dict(a.state_dict())
    b.load_state_dict(b.state_dict())
    assert torch.allclose(b.weight @ a.weight, live, atol=1e-6)
    assert same_bits(a.loaded_origin, a.origin) and same_bits(b.loaded_origin, b.origin)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [5, 1])
def test_rows_without_what_they_began_as_are_refused(rows):
    with pytest.raises(RuntimeError, match="does not end with the start"):
        started(3)[0].load_state_dict({"weight": torch.randn(rows, 5)})


@pytest.mark.parametrize("trained", [False, True])
def test_e_moves_with_its_model_whether_trained_or_not(trained, make_net):
    model = make_net()
    layer = attach(model)[0]
    train_e([layer], trained)
    assert ("E" in dict(layer.a.named_parameters())) == trained and not dict(layer.a.named_buffers())
    model.to(torch.float64)
    copied = copy.deepcopy(layer.a)
    assert layer.a.E.dtype == copied.E.dtype == torch.float64 and layer.a.E.requires_grad == trained
    train_e([layer], True)
    assert isinstance(layer.a.E, torch.nn.Parameter) and layer.a.E.requires_grad


def test_parameters_kept_by_their_names_come_back_where_e_is_trained():
    a = a_factor()
    best = {name: parameter.detach().clone() for name, parameter in a.named_parameters()}
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.mul_(3)
    a.load_state_dict(best)
    assert [*best] == ["weight", "E"] and same_bits(a.A, best["weight"]) and same_bits(a.E, best["E"])

"""The fused forward: the function, gradients and dtypes of PEFT's own, and PEFT's own wherever that cannot be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from pedyra.lora import fused as fused_module
from pedyra.lora.attach import attach, detach
from pedyra.lora.fused import FusedLinear, fuse, unfuse
from pedyra.lora.layer import adapted_layers


@pytest.fixture(autouse=True)
def _fuse_small_layers_too(monkeypatch) -> None:
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (0, 0))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the fused functions that run, in order."""
    seen: list[str] = []
    for name in ("AddedToWeight", "AddedToOutput"):
        function = getattr(fused_module, name)
        original = function.forward

        def forward(ctx, *args, original=original, name=name):
            seen.append(name)
            return original(ctx, *args)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    return seen


def fuse_all(model: Any) -> Any:
    for layer in attach(model):
        fuse(layer.module)
    return model


def pair(make: Callable[..., Any], **settings: Any) -> tuple[Any, Any]:
    """The same attached model twice, with E off its start, the second one fused."""
    models = make(**settings), make(**settings)
    for model in models:
        for layer in attach(model):
            with torch.no_grad():
                layer.a.E.copy_(torch.linspace(0.5, 1.5, len(layer.a.E)))
    return models[0], fuse_all(models[1])


def outcome(model: Any, x: Tensor, context: Any = None) -> dict[str, Tensor]:
    """The output, the gradients of the input and of every trainable parameter, of a loss that weighs them all, and the
    mean squares of the inputs along the probe rows."""
    x = x.detach().clone().requires_grad_()
    with context or torch.enable_grad():
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y.float() * weights).sum().backward()
    gradients = {name: tensor.grad for name, tensor in trained(model).items()}
    assert x.grad is not None and all(gradient is not None for gradient in gradients.values())
    return {"output": y.detach(), "input": x.grad, **gradients, **energies(model)}  # type: ignore[dict-item]


def energies(model: Any) -> dict[str, Tensor]:
    """The mean square of every layer's inputs along each probe row, where that is measured."""
    counted = {layer.name: layer.a.energy for layer in adapted_layers(model)}
    return {f"{name}.energy": sums[:-1] / sums[-1] for name, sums in counted.items() if sums is not None}


def trained(model: Any) -> dict[str, Tensor]:
    """Every parameter that is trained, and every probe that takes a gradient."""
    layers = adapted_layers(model)
    probes = {f"{layer.name}.P": layer.a.probe for layer in layers} | {
        f"{layer.name}.Q": layer.b.probe for layer in layers
    }
    tensors = dict(model.named_parameters()) | {name: probe for name, probe in probes.items() if probe is not None}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def clear(model: Any) -> None:
    for tensor in trained(model).values():
        tensor.grad = None
    for layer in adapted_layers(model):
        if layer.a.energy is not None:
            layer.a.energy.zero_()


def sketch(model: Any, fixed: str, off: tuple[int, ...] = ()) -> None:
    """Two probes a layer, as a sketch sets them: rows P or columns Q `fixed`, the other side zero; triples `off`.

    Where rows are fixed, the energy of each is measured, as it is in a sketch's third part.
    """
    generator = torch.Generator().manual_seed(5)
    for layer in adapted_layers(model):
        P = torch.randn(2, layer.a.in_features, generator=generator)
        Q = torch.randn(layer.b.out_features, 2, generator=generator)
        layer.a.probe = P if fixed == "P" else torch.zeros_like(P).requires_grad_()
        layer.b.probe = Q if fixed == "Q" else torch.zeros_like(Q).requires_grad_()
        if fixed == "P":
            layer.a.energy = torch.zeros(3)
        if off:
            layer.a.kept_directions = torch.eye(layer.rank)
            layer.a.kept_directions[list(off), list(off)] = 0


def in_float32(model: Any, x: Tensor) -> dict[str, Tensor]:
    clone = copy.deepcopy(model).float()
    for twin, layer in zip(adapted_layers(clone), adapted_layers(model), strict=True):  # a copy has no sketch
        twin.a.kept_directions = layer.a.kept_directions
        twin.a.energy = None if layer.a.energy is None else torch.zeros_like(layer.a.energy)
        for ours, theirs in ((twin.a, layer.a), (twin.b, layer.b)):
            probe = theirs.probe
            ours.probe = None if probe is None else probe.detach().float().requires_grad_(probe.requires_grad)
    return outcome(clone, x.float())


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, relative to the largest value in it."""
    assert one.keys() == other.keys()
    return {
        name: float((one[name].float() - other[name].float()).abs().max() / other[name].abs().max()) for name in one
    }


def assert_same(fused: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 4e-6) -> None:
    """Equal types, and equal values but for roundings; float32 has an eps of 1.2e-7."""
    assert [value.dtype for value in fused.values()] == [value.dtype for value in plain.values()]
    assert max(distance(fused, plain).values()) <= tolerance


def assert_as_near(fused: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Equal types, and in half precision no farther from the float32 values than PEFT's own forward is."""
    assert [value.dtype for value in fused.values()] == [value.dtype for value in plain.values()]
    ours, theirs = distance(fused, exact), distance(plain, exact)
    assert sum(ours.values()) <= 2 * sum(theirs.values())  # so few roundings leave much to chance
    assert max(ours.values()) <= 0.1  # a missing or doubled term is of the order of 1


# Net has layers of up to 12 features: 2 tokens are too few to add the triples to the weight, 40 are enough.
@pytest.mark.parametrize(("shape", "function"), [((2, 8), "AddedToOutput"), ((8, 5, 8), "AddedToWeight")])
def test_output_and_gradients_are_those_of_pefts_forward(shape, function, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(shape)
    assert_same(outcome(fused, x), outcome(plain, x))
    assert calls == [function] * 3


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    "grads", [("A",), ("E",), ("B",), ("A", "E", "B")], ids=lambda grads: "".join(grads) + " trained"
)
def test_every_set_of_trained_factors_gets_its_gradients(tokens, grads, make_net):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        for layer in adapted_layers(model):
            for name, parameter in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                parameter.requires_grad_(name in grads)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_layer_may_have_rank_0(tokens, make_net):
    plain, fused = pair(make_net)
    for model in (plain, fused):
        layer = adapted_layers(model)[1]
        layer.a.A, layer.a.E = nn.Parameter(layer.a.A[:0]), nn.Parameter(layer.a.E[:0])
        layer.b.weight = nn.Parameter(layer.b.weight[:, :0])
    x = torch.randn(tokens, 8)
    with torch.no_grad():
        assert torch.allclose(fused(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 40])
def test_under_autocast_types_and_values_are_pefts(tokens, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(tokens, 8)
    exact = outcome(plain, x)
    clear(plain)
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    assert_as_near(outcome(fused, x, autocast()), outcome(plain, x, autocast()), exact=exact)
    assert calls == ["AddedToOutput"] * 3  # a small update would vanish in the rounding of a bfloat16 weight


def test_half_precision_throughout(make_net, calls):
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16)
    x = torch.randn(40, 8, dtype=torch.bfloat16)
    assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    assert calls == ["AddedToOutput"] * 3


def test_a_half_precision_base_with_float32_triples(make_net, calls):
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16)
    for model in (plain, fused):
        for layer in adapted_layers(model):
            layer.module.lora_A.float()
            layer.module.lora_B.float()
    x = torch.randn(40, 8, dtype=torch.bfloat16)
    assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    assert calls == ["AddedToOutput"] * 3


def test_shortened_float32_products_never_see_the_summed_weight(make_net, calls):
    _, fused = pair(make_net)
    torch.set_float32_matmul_precision("high")
    try:
        fused(torch.randn(40, 8))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls == ["AddedToOutput"] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, make_llama, tokens):
    results = []
    for checkpointing in (False, True):
        _, model = pair(make_llama, init_lora_weights=False)
        model.train().enable_input_require_grads()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


def test_disabled_and_merged_adapters_are_pefts_business(make_net, calls):
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(40, 8)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(x), fused(x))
    expected = plain(x)
    fused.merge_adapter()
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-5)
    assert calls == []
    fused.unmerge_adapter()
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-5)
    assert len(calls) == 3


def test_two_active_adapters_and_mixed_batches_fall_back(make_net, calls):
    from peft import LoraConfig

    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    x = torch.randn(4, 8)
    assert torch.equal(plain(x), fused(x))
    for model in (plain, fused):
        model.set_adapter("default")
        model.eval()
    names = ["default", "second", "__base__", "default"]
    assert torch.equal(plain(x, adapter_names=names), fused(x, adapter_names=names))
    assert calls == []


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"bias": "all"}], ids=lambda s: [*s][0]
)
def test_what_is_not_plain_falls_back(settings, make_net, calls):
    plain, fused = pair(make_net, trained=True, **settings)
    results = []
    for model in (plain, fused):
        torch.manual_seed(9)
        results.append(outcome(model, torch.ones(40, 8)))
    assert_same(*results, tolerance=0)
    assert calls == []


def test_dropout_does_not_matter_in_evaluation(make_net, calls):
    plain, fused = pair(make_net, trained=True, lora_dropout=0.1)
    x = torch.randn(40, 8)
    assert torch.allclose(fused.eval()(x), plain.eval()(x), rtol=0, atol=1e-6)
    assert len(calls) == 3


@pytest.mark.parametrize("slot", ["base_layer", "lora_A", "lora_B"])
def test_a_hook_on_a_part_is_still_called(slot, make_net):
    _, fused = pair(make_net)
    module = adapted_layers(fused)[0].module
    part = module.base_layer if slot == "base_layer" else getattr(module, slot)["default"]
    called = []
    part.register_forward_hook(lambda *args: called.append(True))
    fused(torch.randn(40, 8))
    assert called


PROBES = [("P", ()), ("Q", ()), ("P", (0, 2))]


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize(("tokens", "function"), [(2, "AddedToOutput"), (40, "AddedToWeight")])
def test_probes_and_triples_on_trial(tokens, function, fixed, off, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    sketch(plain, fixed, off)
    sketch(fused, fixed, off)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))
    assert calls == [function] * 3


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("grads", [(), ("A",), ("B",)], ids=lambda grads: "".join(grads) + " trained")
def test_probes_get_their_gradients_whatever_is_trained(tokens, grads, fixed, off, make_net):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        sketch(model, fixed, off)
        for layer in adapted_layers(model):
            for name, parameter in (("A", layer.a.A), ("E", layer.a.E), ("B", layer.b.weight)):
                parameter.requires_grad_(name in grads)
    x = torch.randn(tokens, 8)
    assert_same(outcome(fused, x), outcome(plain, x))


@pytest.mark.parametrize("fixed", ["P", "Q"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_layer_of_rank_0_is_probed(tokens, fixed, make_net, calls):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        layer = adapted_layers(model)[1]
        layer.a.A, layer.a.E = nn.Parameter(layer.a.A[:0]), nn.Parameter(layer.a.E[:0])
        layer.b.weight = nn.Parameter(layer.b.weight[:, :0])
        sketch(model, fixed)
        model(torch.ones(tokens, 8)).square().sum().backward()
    torch.testing.assert_close(energies(fused), energies(plain))
    for one, other in zip(trained(fused).values(), trained(plain).values(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize(("fixed", "off"), PROBES)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "bfloat16 base", "small"])
def test_probes_in_half_precision_and_in_small_layers(kind, fixed, off, monkeypatch, make_net, calls):
    if kind == "small":
        monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True, dtype=torch.bfloat16 if "bfloat16" in kind else torch.float32)
    x = torch.randn(40, 8, dtype=torch.bfloat16 if "bfloat16" in kind else torch.float32)
    outcomes = []
    for model in (fused, plain):
        sketch(model, fixed, off)
        if kind == "bfloat16 base":
            for layer in adapted_layers(model):
                layer.module.lora_A.float()
                layer.module.lora_B.float()
        outcomes.append(outcome(model, x, torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else None))
    if kind == "small":
        assert_same(*outcomes)
    else:
        assert_as_near(*outcomes, exact=in_float32(plain, x))
    assert calls == ([] if kind == "small" else ["AddedToOutput"] * 3)


@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients_of_probes_add_up_over_micro_batches(tokens, make_net):
    plain, fused = pair(make_net, trained=True)
    xs = torch.randn(3, tokens, 8)
    for model in (plain, fused):
        sketch(model, "P", (1,))
        for x in xs:
            outcome(model, x)
    gradients = [{name: tensor.grad for name, tensor in trained(model).items()} for model in (fused, plain)]
    assert_same(gradients[0], gradients[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fixed", ["P", "Q"])
def test_probes_under_gradient_checkpointing(reentrant, fixed, make_llama, tokens):
    gradients = []
    for model in pair(make_llama, init_lora_weights=False):
        model.train().enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        sketch(model, fixed)
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        gradients.append({name: tensor.grad for name, tensor in trained(model).items()} | energies(model))
    assert_same(gradients[1], gradients[0], tolerance=1e-4)


def test_probes_that_are_no_sketchs_fall_back(make_net, calls):
    plain, fused = pair(make_net, trained=True)
    for model in (plain, fused):
        for layer in adapted_layers(model):  # both take gradients, and neither is zero: the term is not
            layer.a.probe = torch.ones(2, layer.a.in_features, requires_grad=True)
            layer.b.probe = torch.ones(layer.b.out_features, 2, requires_grad=True)
    x = torch.randn(40, 8)
    assert_same(outcome(fused, x), outcome(plain, x), tolerance=0)
    assert calls == []


@pytest.mark.parametrize("fixed", ["P", "Q"])
def test_a_sketch_saves_the_fixed_probe_and_no_activation(fixed, make_net):
    _, fused = pair(make_net, trained=True)
    sketch(fused, fixed, (1,))
    layer = adapted_layers(fused)[0]
    x = torch.randn(40, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer.module(x)
    probes = {
        tensor.data_ptr()
        for tensor in (layer.a.probe, layer.b.probe)
        if tensor is not None and not tensor.requires_grad
    }
    known = {x.data_ptr(), *probes, *(p.data_ptr() for p in layer.module.parameters())}
    others = [t for t in saved if t.data_ptr() not in known]
    assert probes <= {t.data_ptr() for t in saved}
    assert all(len(t) == layer.rank for t in others)  # kept_directions, and what it leaves of A


def test_only_the_class_of_the_instance_changes_and_detach_gives_it_back(make_net):
    _, fused = pair(make_net, trained=True)
    modules = [layer.module for layer in adapted_layers(fused)]
    assert all(type(module) is FusedLinear for module in modules)
    x = torch.randn(40, 8)
    expected = fused(x)
    clone = copy.deepcopy(fused)
    assert torch.equal(clone(x), expected)
    assert all(type(layer.module) is FusedLinear for layer in adapted_layers(clone))
    assert type(pickle.loads(pickle.dumps(modules[0]))) is FusedLinear
    detach(fused)
    assert all(type(module) is Linear for module in modules)
    assert torch.allclose(fused(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 2, 40])
def test_layers_too_small_for_a_function_are_composed_of_autograds_own(tokens, dtype, monkeypatch, make_net, calls):
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True, dtype=dtype)
    x = torch.randn(tokens, 8, dtype=dtype)
    if dtype == torch.bfloat16 and tokens:
        assert_as_near(outcome(fused, x), outcome(plain, x), exact=in_float32(plain, x))
    elif tokens:
        assert_same(outcome(fused, x), outcome(plain, x))
    else:
        assert torch.equal(fused(x), plain(x))
    assert calls == []
    assert torch.allclose(fused(x[None]), plain(x[None]), atol=0.1) and fused(x[None]).shape == (1, tokens, 6)


def test_small_layers_of_mixed_types_are_not_composed(monkeypatch, make_net, calls):
    monkeypatch.setattr(fused_module, "_LEAST_ELEMENTS", (2**30, 2**30))
    plain, fused = pair(make_net, trained=True)
    x = torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
    assert len(calls) == 3


def test_fuse_says_whether_it_can_help(make_net):
    plain, dora = make_net(), make_net(use_dora=True)
    assert all([fuse(layer.module) for layer in attach(plain)])
    assert not any([fuse(layer.module) for layer in attach(dora)])
    assert not fuse(nn.Linear(2, 2))
    unfuse(nn.Linear(2, 2))


def test_saves_no_activation_but_the_input(make_net):
    _, fused = pair(make_net, trained=True)
    module = adapted_layers(fused)[0].module
    x = torch.randn(40, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(x)
    parameters = {p.data_ptr() for p in module.parameters()}
    assert {t.data_ptr() for t in saved} - parameters == {x.data_ptr()}

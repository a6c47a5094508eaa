"""attach, detach: triples inside PEFT's LoRA layers, and back to ordinary LoRA."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import Tensor, nn

from pedyra.lora.attach_checks import check_no_head, check_supported, check_svd_start
from pedyra.lora.factors import AFactor, BFactor
from pedyra.lora.fused import unfuse
from pedyra.lora.layer_names import pattern_keys
from pedyra.lora.saved import renewed

# Starts of PEFT that rewrite the base weight; what goes to disk must be relative to the pristine one.
_REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class AdaptedLayer:
    """One LoRA layer with triples, under the name it has in the base model."""

    name: str
    module: Any
    """PEFT's LoraLayer."""
    adapter: str

    @cached_property
    def _slots(self) -> tuple[Any, Any]:
        """PEFT's `lora_A` and `lora_B`, which stay; what they hold may not."""
        return self.module.lora_A, self.module.lora_B

    @property
    def a(self) -> AFactor:
        return self._slots[0][self.adapter]

    @property
    def b(self) -> BFactor:
        return self._slots[1][self.adapter]

    @property
    def factors(self) -> tuple[nn.Parameter, Tensor, nn.Parameter]:
        """A `(r, in)`, E `(r,)` and B `(out, r)`, now; E may be no Parameter, see `AFactor.train_e`."""
        a = self.a
        return a.A, a.E, self.b.weight

    @property
    def rank(self) -> int:
        return self.a.out_features

    @property
    def scaling(self) -> float:
        """alpha / r at attach; constant for the whole run, so that a rank change never rescales what stays."""
        return self.module.scaling[self.adapter]

    @property
    def cost(self) -> int:
        """Trainable parameters of one triple: in + out, and 1 where E is trained; E is folded away on disk."""
        a = self.a
        return a.in_features + self.b.out_features + int(a.E.requires_grad)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rank, in, out)."""
        a = self.a
        return a.out_features, a.in_features, self.b.out_features

    @property
    def parameters(self) -> int:
        """Trainable parameters of all the layer's triples, now."""
        A, E, B = self.factors
        return A.numel() + B.numel() + (E.numel() if E.requires_grad else 0)

    def rescale(self, factor: float) -> None:
        """Multiply the scaling, for the methods that define it by the current rank; see `write_ranks`."""
        self.module.scaling[self.adapter] *= factor


def attach(model: nn.Module, adapter_name: str = "default", start: str = "lora", seed: int = 0) -> list[AdaptedLayer]:
    """Put triples into every LoRA layer of `model` that holds `adapter_name`; attaching twice changes nothing.

    With start="lora" (E = 1) this is an identity: same function, same Parameters A and B, same first update. With
    start="svd" a fresh adapter becomes A, B ~ N(0, 0.02^2), E = 0 (AdaLoRA), and one that already holds an update
    (PiSSA) is re-factored exactly into its singular triples. `seed` feeds the Gaussian draws.

    Returns the adapted layers, in the model's order.

    Raises:
        ValueError: no such adapter, or a layer that cannot hold triples (embedding, convolution, MoE parameter).
    """
    if isinstance(getattr(model, "module", None), PeftModel):  # DistributedDataParallel, DataParallel
        raise ValueError(f"the model is inside a {type(model).__name__}; give the PEFT model itself, its .module")
    layers = list(_lora_layers(model, adapter_name))
    if not layers:
        raise ValueError(
            f"the model has no LoRA adapter named {adapter_name!r}; wrap it with "
            f"peft.get_peft_model(model, LoraConfig(...)) first, or pass the adapter's name"
        )
    if all(_holds_triples(layer) for layer in layers):
        return layers
    init = getattr(model.peft_config[adapter_name], "init_lora_weights", True)  # type: ignore[index]
    check_supported(model.peft_config[adapter_name], layers)  # type: ignore[index]
    rewritten = isinstance(init, str) and init.startswith(_REWRITES_BASE)
    if rewritten:
        check_no_head(model, layers, str(init))
    if start == "svd":
        check_svd_start(layers, init)
    # The live config will carry this run's ranks: never write into an object the user may reuse.
    model.peft_config[adapter_name] = copy.deepcopy(model.peft_config[adapter_name])  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        _attach_layer(layer, rewritten=rewritten)
        if start == "svd":
            _start_svd(layer, generator)
    write_ranks(model, adapter_name)
    _watch_loading(model)
    return layers


def train_e(layers: Iterable[AdaptedLayer], on: bool) -> None:
    """Train E where A is, or leave it as it is: with E = 1 the triples then learn as a plain LoRA of the same ranks."""
    for layer in layers:
        layer.a.train_e(on)
        layer.a.unit = not on and bool((layer.a.E == 1).all())


def drop_empty(layers: Iterable[AdaptedLayer]) -> dict[Tensor, Tensor]:
    """Give each layer rank 0 again that has it on disk: one triple, all zero, which could never learn.

    Returns old factor -> new, for an optimizer that holds the old ones.
    """
    successors: dict[Tensor, Tensor] = {}
    for layer in layers:
        A, E, B = layer.factors
        if layer.rank == 1 and layer.a.origin is None and not A.is_meta and not A.any() and not B.any():
            with torch.no_grad():
                news: list[Any] = [renewed(old, old.narrow(dim, 0, 0).clone()) for old, dim in ((A, 0), (E, 0), (B, 1))]
                layer.a.A, layer.a.E, layer.b.weight = news
            successors |= zip((A, E, B), layer.factors, strict=True)
    return successors


def _ranks_as_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    """After `load_state_dict`: PEFT's config says what ranks the adapters have now, and saves what it says."""
    for name in getattr(model, "peft_config", {}):
        layers = adapted_layers(model, name)
        drop_empty(layers)
        if any(layer.module.r[name] != max(1, layer.rank) for layer in layers):
            # Not the scaling in force, which PEFT may have changed for a while (`set_scale`).
            write_ranks(model, name, {x.name: x.module.lora_alpha[name] / x.module.r[name] for x in layers})


def _watch_loading(model: nn.Module) -> None:
    """Have `_ranks_as_loaded` called while some adapter holds triples, and not otherwise."""
    holds = any(adapted_layers(model, name) for name in getattr(model, "peft_config", {}))
    hooks = model._load_state_dict_post_hooks
    ours = [key for key, hook in hooks.items() if hook is _ranks_as_loaded]
    if holds and not ours:
        model.register_load_state_dict_post_hook(_ranks_as_loaded)
    for key in () if holds else ours:
        del hooks[key]


def detach(model: nn.Module, adapter_name: str = "default") -> None:
    """The inverse of `attach`: ordinary `nn.Linear` slots with E folded into A, same function.

    The slots hold what goes to disk: a layer of rank 0 becomes one zero row, and where PEFT's start rewrote the base
    weight (PiSSA) the base gets its pristine value back and the start joins the factors. All are new Parameters.

    Raises:
        ValueError: nothing is attached under this name, or a quantised base weight cannot be given back its value.
    """
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"no triples are attached to adapter {adapter_name!r}; there is nothing to detach")
    for layer in layers:
        if layer.a.origin is not None and not layer.module.get_base_layer().weight.is_floating_point():
            raise ValueError(
                f"the quantised weight of {layer.name} was rewritten by the adapter's start and cannot be restored; "
                f"save the attached model with save_pretrained and load that"
            )
    for layer in layers:
        _detach_layer(layer)
    _watch_loading(model)


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> list[AdaptedLayer]:
    """The layers that hold triples now, in the model's order."""
    return [layer for layer in _lora_layers(model, adapter_name) if _holds_triples(layer)]


def write_ranks(model: nn.Module, adapter_name: str = "default", scalings: Mapping[str, float] | None = None) -> None:
    """Bring the live PEFT config, and each layer's `r` and `lora_alpha`, in line with the ranks as they are.

    Full module names go into `rank_pattern`, and alpha = scaling * r into `alpha_pattern`, so that any consumer of
    alpha / r reproduces the constant scaling; rank 0 counts as the one zero row it has on disk. Where all layers have
    one rank and one alpha, `r` and `lora_alpha` say so without patterns, which some readers pass over, and which take
    PEFT half of its time to load. `use_rslora` and the start no longer describe what is on disk (PEFT would redo a
    start on loading, and refuse odd ranks for "orthogonal"): they are set to what any LoRA loads with. `scalings` are
    those of the layers, by name, where they are not the ones in force.
    """
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    layers = adapted_layers(model, adapter_name)
    keys = pattern_keys(layer.name for layer in layers)
    config.rank_pattern, config.alpha_pattern = {}, {}
    for layer in layers:
        origin = layer.a.origin
        scaling = layer.scaling if scalings is None else scalings[layer.name]
        on_disk = max(1, layer.rank + (0 if origin is None else origin.shape[0]))
        key = keys[layer.name]
        config.rank_pattern[key] = on_disk
        config.alpha_pattern[key] = scaling * on_disk
        layer.module.r[adapter_name] = max(1, layer.rank)
        layer.module.lora_alpha[adapter_name] = scaling * max(1, layer.rank)
        layer.module.use_rslora[adapter_name] = False
    ranks, alphas = set(config.rank_pattern.values()), set(config.alpha_pattern.values())
    if len(ranks) == len(alphas) == 1:
        config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = ranks.pop(), alphas.pop(), {}, {}
    config.init_lora_weights = True
    config.use_rslora = False


def _lora_layers(model: nn.Module, adapter_name: str) -> Iterator[AdaptedLayer]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A):
            yield AdaptedLayer(name, module, adapter_name)


def _holds_triples(layer: AdaptedLayer) -> bool:
    # An embedding has its slots elsewhere, and lora_A is empty.
    return layer.adapter in layer.module.lora_A and isinstance(layer.module.lora_A[layer.adapter], AFactor)


def _attach_layer(layer: AdaptedLayer, *, rewritten: bool) -> None:
    linear_A, linear_B = layer.module.lora_A[layer.adapter], layer.module.lora_B[layer.adapter]
    A, B = linear_A.weight, linear_B.weight  # the same Parameters: an optimizer that holds them stays right
    E = nn.Parameter(torch.ones(A.shape[0], dtype=A.dtype, device=A.device), requires_grad=A.requires_grad)
    origin_A = A.detach().clone() if rewritten else None
    origin_B = B.detach().clone() if rewritten else None
    a = AFactor(A, E, origin_A).train(linear_A.training)
    b = BFactor(B, linear_B.bias, origin_B).train(linear_B.training)
    layer.module.lora_A[layer.adapter], layer.module.lora_B[layer.adapter] = a, b


@torch.no_grad()
def _detach_layer(layer: AdaptedLayer) -> None:
    a, b, module, adapter = layer.a, layer.b, layer.module, layer.adapter
    if a.origin is not None and b.origin is not None:
        weight = module.get_base_layer().weight
        weight += transpose(layer.scaling * (b.origin @ a.origin), module.fan_in_fan_out).to(weight.dtype)
    for slots, factor, trainable in ((module.lora_A, a, a.A.requires_grad), (module.lora_B, b, b.weight.requires_grad)):
        weight = factor.state_dict()["weight"]
        linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(factor.training)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=trainable), factor.bias
        slots[adapter] = linear
    module.r[adapter] = module.lora_A[adapter].out_features
    module.lora_alpha[adapter] = layer.scaling * module.r[adapter]
    unfuse(module)


@torch.no_grad()
def _start_svd(layer: AdaptedLayer, generator: torch.Generator) -> None:
    a, b = layer.a, layer.b
    if not a.A.any() and not b.weight.any():
        return  # rank 0 on disk, see `drop_empty`
    update = None
    if b.weight.any():  # already an update: its exact singular triples, same function
        q_A, upper_A = torch.linalg.qr(a.A.float().T)
        q_B, upper_B = torch.linalg.qr(b.weight.float())
        U, S, Vh = torch.linalg.svd(upper_B @ upper_A.T, full_matrices=False)
        update = Vh @ q_A.T, S, q_B @ U
    for parameter in (a.A, b.weight):  # 0.02: AdaLoRA's initial std
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    a.E.zero_()
    if update is not None:
        found = len(update[1])  # fewer than r where the layer is narrower; the others stay as new ones
        a.A[:found], a.E[:found], b.weight[:, :found] = update

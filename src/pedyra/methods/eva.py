"""EVA (Paischer et al. 2024): ranks and A from the principal components of each layer's inputs. PEFT's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor

from pedyra.lora.layer import lora_layers
from pedyra.methods.data import Data
from pedyra.methods.method import Adaptation, Method, Request, changed

RHO = 2.0
"""A layer's rank is at most rho r; PEFT's own default."""


def prepare(request: Request) -> Adaptation:
    """LoRA whose A rows are the top right-singular vectors of the layer's inputs over the training rows, B = 0.

    The budget of layers x r ranks goes, once, to the components that explain most variance over all layers; a layer
    that gets none is not adapted. The scaling stays alpha / r. Padding, and for causal_lm the prompt (label -100), are
    left out, as in PEFT; so are the position embeddings that DeBERTa sends through its projections. Raises ValueError:
    another start, rsLoRA, an encoder-decoder, a batch with fewer vectors than rho r for some layer, or a layer with
    narrower inputs or none.
    """
    request.refuse_lora("EVA is a start of its own, at the scaling alpha / r", "init", "use_rslora")
    if getattr(getattr(request.model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "the base model is an encoder-decoder, but EVA leaves out the padding of one sequence, and its decoder "
            "sees another; use an encoder or a decoder, or method gora"
        )
    data = request.data
    assert data is not None
    config = changed(request.lora, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO))
    needed = round(request.lora.r * RHO)
    first = next(data.batches())
    mask = data.mask(first)
    with warnings.catch_warnings():  # that it could begin without weights: the check below needs them
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
        model = request.with_adapter(config)
    _check_layers(model, lambda: data.loss(model, first), lambda x: len(counted(x, mask)), needed)
    with redirect_stdout(StringIO()):  # PEFT prints a line for each call without vectors
        initialize_lora_eva_weights(
            model,
            _Batches(data),
            forward_fn=data.loss,
            prepare_model_inputs_fn=lambda batch, config: data.mask(batch),
            prepare_layer_inputs_fn=lambda inputs, mask, name: counted(inputs[0], mask),
            show_progress_bar=False,
        )
    # PEFT makes a layer whose rank has changed anew, in the base's dtype; it trains in float32, as the others do.
    cast_adapter_dtype(model, "default")
    return Adaptation(model=model)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors `(n, in)` that count, of an input `(..., in)` of a layer: those in `mask` `(rows, tokens)`.

    A layer may see all rows in one, `(rows tokens, in)`, as in OPT. One that sees a vector a row, such as BERT's
    pooler, has none to leave out. What else it sees is of no row, such as DeBERTa's position embeddings: none counts.
    """
    if mask is None:
        return x.flatten(0, -2).contiguous()
    places = x.shape[:-1]
    if places in (mask.shape, mask.flatten().shape):
        return x[mask.to(x.device).view(places)]
    return x.contiguous() if places == mask.shape[:1] else x.new_zeros(0, x.shape[-1])


class _Batches:
    """Batches as PEFT goes through them: with a length, of which it asks whether it is zero."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return self.data.batches()


def _check_layers(model: PeftModel, forward: Callable[[], object], count: Callable[[Tensor], int], needed: int) -> None:
    """One forward pass: a layer that sees no input of a row, or too few for its components, or is too narrow for them,
    is told by name. PEFT passes over one that sees too few in a batch, and would wait for it for ever.

    Args:
        count: of the vectors that count in the input of a layer.
    """
    seen: dict[str, int] = {}
    layers = {layer.name: layer.module for layer in lora_layers(model, "default")}

    def see(x: Tensor, name: str) -> None:
        seen[name] = max(seen.get(name, 0), count(x))  # DeBERTa's sees position embeddings too

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: see(args[0], name))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if not seen.get(name):
            raise ValueError(
                f"{name} sees no input of a row in the forward pass, so EVA has none to look at; leave it out with "
                f"lora.exclude_modules"
            )
        if seen[name] < needed:
            raise ValueError(
                f"a batch has {seen[name]} vectors for {name}, but EVA needs {needed} ({RHO:g} lora.r) for as many "
                f"components; raise training.per_device_train_batch_size"
            )
        if layer.in_features < needed:
            raise ValueError(
                f"the inputs of {name} have {layer.in_features} components, but EVA looks for {needed} "
                f"({RHO:g} lora.r); lower lora.r"
            )


METHOD = Method("eva", "LoRA with ranks and A from the inputs (Paischer et al. 2024)", prepare)

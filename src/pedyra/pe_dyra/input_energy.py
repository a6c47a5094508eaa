"""The input energy of Eq. (6), collected by forward hooks: sum of x^2 per feature and the tokens it was summed over."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.distributed import Average
from pedyra.lora.layer import AdaptedLayer


class Watch:
    """A forward hook that does nothing in a copy of its module, or a pickle: neither is the model that is trained."""

    def __init__(self, see: Callable[..., object] | None = None) -> None:
        self._see = see

    def __call__(self, *call: Any) -> None:
        if self._see is not None:
            self._see(*call)

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


class InputEnergy:
    """Hooks on the adapted layers count each token of a training forward once, and padding, where it is known, not at
    all.

    Padding is known by `attention_mask`, in the decoder of an encoder-decoder model by `decoder_attention_mask` or the
    labels that count, whether the PEFT model is called, the base model inside, or that without its head. The input is
    taken before LoRA's dropout. A layer that is called with the batch's tokens, and then with something else, as
    DeBERTa calls its queries and keys with the embeddings of relative positions, is seen the first time alone. Layers
    that receive the very same tensor (q, k, v) share one sum. The recomputation of gradient checkpointing runs inside
    the backward pass and is not counted again.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AdaptedLayer], average: Average) -> None:
        self.active, self._average = False, average
        self._widths, self._device = [layer.a.in_features for layer in layers], layers[0].a.A.device
        self._sums: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        """The sum of squares and the number of tokens of each layer that was called."""
        self._adapter = layers[0].adapter
        self._mask: Tensor | None = None
        self._target_mask: Tensor | None = None
        self._real: dict[tuple[torch.Size, bool], Tensor] = {}
        self._had_tokens: set[int] = set()
        """The layers whose input in this forward was the tokens of the batch."""
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # an input, and its sums
        decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        self._of_target = [decoder and _sees_target(layer.name) for layer in layers]
        """Whether the input of each layer is tokens of the decoder."""
        self._outermost: str | None = None
        """Which of the modules below runs and has none of the others around it."""
        self._handles: list[Any] = []
        # Some trainers (TRL's distillation) call the base model, or what it is without its head, themselves.
        headless = getattr(base, "base_model", None)
        places = {headless: "headless", base: "base", model: "peft"}
        for module, place in places.items():
            if not isinstance(module, nn.Module):
                continue
            names = [*inspect.signature(base.forward if module is model else module.forward).parameters]
            position = names.index("attention_mask") if "attention_mask" in names else None
            enter = Watch(functools.partial(self._enter, place=place, position=position))
            leave = Watch(functools.partial(self._leave, place=place))
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        for index, layer in enumerate(layers):
            watch = Watch(functools.partial(self._see_layer, index=index))
            self._handles.append(layer.module.register_forward_pre_hook(watch))

    def collect(self) -> list[Tensor | None]:
        """Return the mean square per feature `(in,)` of every layer since the last call; None where nothing was
        seen."""
        if self._average.processes > 1:
            self._average_sums()
        # Layers that shared an input share its sum. One division for all: on a GPU launches are what costs.
        distinct = {id(pair): pair for pair in self._sums if pair is not None}
        means: dict[int, Tensor] = {}
        if distinct:
            totals, counts = zip(*distinct.values(), strict=True)
            widths = [len(total) for total in totals]
            tokens = per_element(torch.stack(counts).clamp_min_(NO_TOKEN), widths)
            means = dict(zip(distinct, (torch.cat(totals) / tokens).split(widths), strict=True))
        result = [means.get(id(pair)) for pair in self._sums]
        self._sums = [None] * len(self._sums)
        self._forget_forward()
        return result

    def _average_sums(self) -> None:
        """Average over the processes, of which each may have seen other layers: one collective, and one wait for the
        device."""
        pairs = (
            pair or (torch.zeros(width, device=self._device), torch.zeros((), device=self._device))
            for pair, width in zip(self._sums, self._widths, strict=True)
        )
        totals, counts = zip(*pairs, strict=True)
        flat = self._average(torch.cat([*totals, torch.stack(counts)]))
        *totals, means = flat.split([*self._widths, len(counts)])
        averages = zip(totals, means, (means > 0).tolist(), strict=True)
        self._sums = [(total, count) if seen else None for total, count, seen in averages]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget_forward()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict, *, place: str, position: int | None) -> None:
        if self._outermost is not None and place != "peft":
            return
        mask = kwargs.get("attention_mask")
        if mask is None and position is not None and position < len(args):
            mask = args[position]
        self._forget_forward()
        self._outermost, self._mask = place, _two_dimensional(mask)
        self._with_gradients = torch.is_grad_enabled()
        if any(self._of_target):
            target, labels = kwargs.get("decoder_attention_mask"), _two_dimensional(kwargs.get("labels"))
            if target is None and labels is not None:
                target = labels != IGNORED
            self._target_mask = _two_dimensional(target)

    def _trains(self, module: nn.Module) -> bool:
        """Say whether this forward is one of training, and not one that writes text or asks a reference.

        A model may be trained in its evaluation mode, without dropout. And layers whose activations are checkpointed
        run a first time without gradients, in a model that has them.
        """
        if torch.is_grad_enabled():
            return True
        return module.training and (self._outermost is None or self._with_gradients)

    def _leave(self, *_: Any, place: str) -> None:
        if self._outermost == place:
            self._forget_forward()

    def _forget_forward(self) -> None:
        self._last = self._mask = self._target_mask = self._outermost = None
        self._with_gradients = False
        self._real = {}
        self._had_tokens = set()

    def _see_layer(self, module: nn.Module, args: tuple[Tensor, ...], *, index: int) -> None:
        module_: Any = module
        x = args[0]
        if not self.active or not self._trains(module):
            return
        if module_.disable_adapters or self._adapter not in module_.active_adapters:
            return  # a reference model runs (DPO), the base or another adapter
        if self._mask_of(x, self._of_target[index]) is not None:
            self._had_tokens.add(index)
        elif index in self._had_tokens:
            return
        if torch.compiler.is_compiling():  # the compiler itself merges equal sums, and must not keep inputs alive
            real = self._real_tokens_of(x, self._of_target[index])
            self._add(index, (_energy(x.detach(), real), real.sum()))
            return
        if torch._C._current_graph_task_id() != -1:
            return
        if self._last is None or self._last[0] is not x:
            real = self._real_tokens(x, self._of_target[index])
            self._last = (x, (_energy(x.detach(), real), real.sum()))
        self._add(index, self._last[1])

    def _add(self, index: int, sums: tuple[Tensor, Tensor]) -> None:
        earlier = self._sums[index]
        self._sums[index] = sums if earlier is None else (earlier[0] + sums[0], earlier[1] + sums[1])

    def _real_tokens(self, x: Tensor, of_target: bool) -> Tensor:
        """Return `_real_tokens_of`, made once per forward for inputs of equal shape."""
        key = x.shape[:-1], of_target
        if key not in self._real:
            self._real[key] = self._real_tokens_of(x, of_target)
        return self._real[key]

    def _mask_of(self, x: Tensor, of_target: bool) -> Tensor | None:
        """Return the mask of x `(rows, tokens, in)` or, as OPT and routers of experts have it, `(rows * tokens, in)`;
        None where none is known, or x holds something else than these tokens."""
        mask = self._target_mask if of_target else self._mask
        return mask if mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)) else None

    def _real_tokens_of(self, x: Tensor, of_target: bool) -> Tensor:
        """Return 1 for each token of x `(..., in)` that is real and 0 for padding, `(tokens,)`."""
        if (mask := self._mask_of(x, of_target)) is not None:
            return (mask != 0).reshape(-1).to(x.device, torch.float32)
        return torch.ones(x.shape[:-1].numel(), device=x.device, dtype=torch.float32)


IGNORED = -100
"""The label of what does not count, by which transformers pads targets."""
# Cross attention takes its keys and values from the source: BART and Marian, T5, EncoderDecoderModel of BERTs.
_CROSS, _OF_SOURCE = (
    ("encoder_attn", "EncDecAttention", "crossattention"),
    ("k_proj", "v_proj", "k", "v", "key", "value"),
)


def _sees_target(name: str) -> bool:
    """Say whether the input of a layer of this name, in an encoder-decoder model, is tokens of the target."""
    parts = name.split(".")
    return "decoder" in parts and not (any(part in _CROSS for part in parts) and parts[-1] in _OF_SOURCE)


def _two_dimensional(mask: object) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def per_element(values: Tensor, widths: Sequence[int]) -> Tensor:
    """Repeat value i `widths[i]` times, `(sum of widths,)`, without waiting for the device."""
    repeats = torch.tensor(widths, device=values.device)
    return values.repeat_interleave(repeats, output_size=sum(widths))


NO_TOKEN = 1e-3
"""Below every count of tokens, a mean over processes too: no division by zero."""

# Squares of this many bytes stay in the cache; a temporary of the input's size would be written out and read back.
_CHUNK_BYTES = 512 * 1024


def _energy(x: Tensor, real: Tensor) -> Tensor:
    """Sum the squares per feature `(in,)`, in float32, over the tokens of x `(..., in)` that are `real` `(tokens,)`.

    The hooks run inside the forward pass, so under autocast a product is one of its type: in bfloat16 a sum is off by
    1e-3, and in float16 one above 65,504 is infinite. Autocast leaves operations in place as they are.
    """
    rows = x.reshape(-1, x.shape[-1])
    # A GPU streams the whole temporary faster than it launches many small kernels.
    chunk = max(1, len(rows) if rows.is_cuda else _CHUNK_BYTES // (4 * rows.shape[1]))
    total = torch.zeros(rows.shape[1], device=rows.device, dtype=torch.float32)
    for part, weight in zip(rows.split(chunk), real.split(chunk), strict=True):
        total.addmv_(part.float().square().T, weight)
    return total

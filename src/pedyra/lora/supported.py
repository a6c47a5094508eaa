"""One table says which kinds of LoRA each verb takes; whoever adapts, fits, exports or merges reads it.

A kind that a verb does not take is refused with the reason and the repair, before anything is changed. Mistakes of one
adapter alone (it is merged already, its file is damaged) are reported where they are detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pedyra.errors import UserError

VERBS = {
    "adapt": "cannot be adapted",
    "fit": "cannot be fitted",
    "peft": "cannot be exported",
    "padded": "cannot be exported to target padded",
    "gguf": "cannot be exported to target gguf",
    "merged": "cannot be merged from a folder",
}
"""A verb and its words in a refusal: ranks move, a LoRA is made smaller, or is exported to one of the targets."""


@dataclass(frozen=True)
class Kind:
    """A row names one kind of LoRA and the verbs that do not take it."""

    name: str
    sign: str
    """Its field of LoraConfig, or "a layer"."""
    is_in: Callable[[Mapping[str, Any]], bool] = lambda config: False
    """Recognises the kind by LoraConfig's fields; `kind_of_module`, or the file, says that of layers."""
    refused: tuple[str, ...] = ()
    why: str = ""
    repair: str = ""
    """{layer} in it is the first layer of this kind."""


_PLAIN, _REPEATED, _LOFTQ, _MICA = ("eva", "orthogonal", "gaussian"), ("pissa", "olora"), ("loftq",), ("mica",)
"""Starts (init_lora_weights): the first leave the base as it was, and PEFT repeats the next from it alone."""


def _start(config: Mapping[str, Any]) -> str | None:
    """Return the name of the start, which PEFT takes in any case of letters; None is its default."""
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) else None


def _has(*fields: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: any(config.get(field) and config.get(field) != "none" for field in fields)


_EXPORTS: tuple[str, ...] = ("peft", "padded", "gguf")
_RELATIVE = (
    "train it with pedyra.adapt, whose folders hold the difference to the original base, or save it with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), as PEFT documents"
)
_LEAVE_OUT = "leave it out with LoraConfig(exclude_modules=[{layer!r}])"


def _no_linear(name: str) -> Kind:
    why = "only the factors of linear layers are taken"
    return Kind(name, "a layer", refused=("adapt", "fit", "gguf"), why=why, repair=_LEAVE_OUT)


def _beside(name: str, sign: str, is_in: Callable[[Mapping[str, Any]], bool] = lambda config: False) -> Kind:
    """Make the row of what is saved beside the factors."""
    why = "llama.cpp's converter takes the factors of a LoRA and nothing else"
    return Kind(name, sign, is_in, ("gguf",), why, "use target merged and convert the whole model")


KINDS: tuple[Kind, ...] = (
    Kind(
        "AdaLoRA and others that are no LoRA",
        "peft_type",
        lambda config: config.get("peft_type", "LORA") != "LORA",
        ("adapt", "fit", *_EXPORTS, "merged"),
        "it is no LoRA",
        "train a LoRA (peft.LoraConfig); in place of AdaLoRA method adalora-svd, which ends with one",
    ),
    Kind("LoRA", "nothing"),
    Kind("rsLoRA", "use_rslora", _has("use_rslora")),
    Kind("EVA, orthogonal, Gaussian", "init_lora_weights", lambda config: _start(config) in _PLAIN),
    Kind(
        "DoRA",
        "use_dora",
        _has("use_dora"),
        ("padded", "gguf"),
        "this form has no place for the magnitude of a layer",
        "use target merged, or peft where PEFT itself serves it",
    ),
    Kind(
        "PiSSA, OLoRA",
        "init_lora_weights",
        lambda config: _start(config) in _REPEATED,
        ("fit", *_EXPORTS),
        "its factors are relative to a base that its start has changed",
        _RELATIVE,
    ),
    Kind(
        "PiSSA by a fast SVD, CorDA, LoRA-GA, or a start that is unknown here",
        "init_lora_weights",
        lambda config: _start(config) not in (None, *_PLAIN, *_REPEATED, *_LOFTQ, *_MICA),
        ("fit", *_EXPORTS, "merged"),
        "its factors are relative to a base that its start has changed, in a way that does not come out twice",
        f"{_RELATIVE}, or merge the live model",
    ),
    Kind(
        "LoftQ",
        "init_lora_weights",
        lambda config: _start(config) in _LOFTQ,
        ("adapt", "fit", *_EXPORTS, "merged"),
        "its factors belong to quantised weights that no adapter file can hold",
        "quantise the base (nf4) and use the default start; what is trained already can be merged while it is live",
    ),
    Kind(
        "MiCA",
        "init_lora_weights",
        lambda config: _start(config) in _MICA,
        ("adapt",),
        "B is fixed to singular vectors of the weight, and new directions would have none",
        "use the default start",
    ),
    Kind(
        "aLoRA, Arrow, QA-LoRA, BD-LoRA, KaSA, MonteCLoRA, VeLoRA",
        "a field of the variant's name",
        _has(
            *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"),
            *("kasa_config", "monteclora_config", "velora_config"),
        ),
        ("adapt", "fit", *_EXPORTS, "merged"),
        "its update depends on the token, is no product of two matrices, or has another layout",
        "PEFT alone can serve it; to go on here, train a plain LoRA or a DoRA",
    ),
    Kind(
        "experts",
        "target_parameters",
        _has("target_parameters"),
        ("adapt", "fit", *_EXPORTS),
        "the factors of all experts of a layer are one tensor, and PEFT fills target_parameters in by itself for some "
        "models",
        "leave target_parameters out and name the linear layers, e.g. target_modules=['q_proj', 'v_proj']; what is "
        "trained already can be merged (target merged)",
    ),
    _no_linear("embedding"),
    _no_linear("convolution"),
    Kind(
        "MultiheadAttention",
        "a layer",
        refused=("adapt", "fit"),
        why="PEFT calls no LoRA slot in it, so that nothing can be measured there",
        repair="leave it and its out_proj out with LoraConfig(exclude_modules=[{layer!r}, '{layer}.out_proj'])",
    ),
    Kind(
        "unknown layer",
        "a layer",
        refused=("adapt", "fit"),
        why="its factors are no torch.nn.Linear, or it is a variant of LoRA that is newer than this table",
        repair=_LEAVE_OUT,
    ),
    _beside("biases", "bias, lora_bias", _has("bias", "lora_bias")),
    _beside("heads", "modules_to_save", _has("modules_to_save")),
    _beside("trained tokens", "trainable_token_indices", _has("trainable_token_indices")),
    _beside("other tensors", "a tensor beside the factors, such as the embedding of a resized vocabulary"),
)

BESIDE = KINDS[-1].name
_OF_LAYERS = {kind.name for kind in KINDS if kind.sign.startswith("a ")}


def kinds_of(config: Mapping[str, Any], layers: Iterable[str] = ()) -> list[Kind]:
    """List the kinds of an adapter, by its LoraConfig (or adapter_config.json) and the names of those of its layers."""
    return [kind for kind in KINDS if kind.name in layers or kind.is_in(config)]


def check_supported(verb: str, title: str, config: Mapping[str, Any], layers: Mapping[str, str] | None = None) -> None:
    """Raise ValueError for an adapter of a kind that this verb does not take; `layers` has the kind of each layer that
    is not plainly linear."""
    layers = layers or {}
    for kind in kinds_of(config, layers.values()):
        if verb in kind.refused:
            layer = next((name for name, each in layers.items() if each == kind.name), "")
            what = f"{layer}: {kind.name}" if kind.name in _OF_LAYERS else f"{title}: {kind.name} ({kind.sign})"
            raise UserError(f"{what} {VERBS[verb]}: {kind.why}; {kind.repair.format(layer=layer)}")


def kind_of_module(module: Any, adapter: str) -> str | None:
    """Tell the kind of a live LoRA layer of PEFT where the config does not say it; None for a linear one."""
    if type(module).__name__ == "MultiheadAttention":
        return "MultiheadAttention"
    if type(module).__name__ == "ParamWrapper":
        return "experts"
    if adapter in module.lora_embedding_A:
        return "embedding"
    slot = module.lora_A[adapter]
    if hasattr(slot, "kernel_size"):
        return "convolution"
    variant = type(module.lora_variant[adapter]).__name__ if adapter in module.lora_variant else ""
    is_known = not variant or any(each in variant for each in _KNOWN_VARIANTS)
    return None if is_known and type(slot).__name__ in ("Linear", "AFactor") else "unknown layer"


_KNOWN_VARIANTS = ("Dora", "Arrow", "BdLora", "ALora", "Velora", "Monteclora", "MiCA", "Kasa", "QALora")
"""Parts of the names of PEFT's variant classes; the config says which of them the adapter has."""

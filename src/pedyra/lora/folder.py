"""A LoRA lies on disk in PEFT's form; it is written here, and read without a model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.lora.files import SUMS, check_shape, check_sums, read_json, read_sums, write_file, write_folder, write_sums
from pedyra.lora.layer import peft_layers
from pedyra.lora.supported import BESIDE, check_supported

PREFIX = "base_model.model."
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SLOTS = {
    "A": "A",
    "B": "B",
    "E": "E",  # of PEFT's AdaLoRA
    "A.weight": "A",
    "B.weight": "B",
    "B.bias": "bias",
    "embedding_A": "A",
    "embedding_B": "B",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}


def find_adapter(path: Path) -> Path:
    """Find the adapter folder of a run, or take the folder itself if it is one. Raises ValueError: neither, or a file
    of it is not the one that was written."""
    if not path.is_dir():
        problem = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{path} {problem}; give a run folder or an adapter folder")
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise UserError(f"{folder} has no adapter_model.safetensors; save the adapter in that format")
            if (folder / SUMS).is_file():  # PEFT writes none
                try:
                    check_sums(folder, [name for name in ADAPTER_FILES if name in read_sums(folder)])
                except ValueError as error:
                    raise UserError(f"{error}; if you changed it yourself, remove {SUMS} beside it") from None
            return folder
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    hint = f"; its run is unfinished, try {checkpoints[-1]}" if checkpoints else ""
    raise UserError(f"{path} holds no adapter (adapter_config.json){hint}")


_OF_LORA = {
    **{"r": int, "lora_alpha": float, "rank_pattern": (dict, None), "alpha_pattern": (dict, None)},
    "modules_to_save": (list, None),
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises ValueError for a damaged one, and for one with a `megatron_config`, because
    PEFT would import the module that it names."""
    return read_json(folder / "adapter_config.json", {"peft_type": str, "megatron_config": None})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises ValueError, with the file's name, if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def keys_by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group the keys: layer name in the base model -> slot (A, B, E, bias, magnitude) -> key of its tensor."""
    result: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, slot = key.removeprefix(PREFIX).rpartition(".lora_")
        if name and slot in _SLOTS:
            result.setdefault(name, {})[_SLOTS[slot]] = key
    return result


@dataclass(frozen=True)
class SavedLayer:
    """A layer adds scaling * B A to its weight, with A `(rank, in)` and B `(out, rank)` under their keys; its name is
    that in the base model."""

    name: str
    keys: dict[str, str]
    """Slot (A, B, bias, magnitude) -> the key of its tensor."""
    rank: int
    scaling: float


@dataclass(frozen=True)
class SavedLora:
    """The contents of an adapter folder: `adapter_config.json` and the tensors of `adapter_model.safetensors`."""

    title: str
    """Its name in messages: the folder's path, or the name of a live adapter."""
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: list[SavedLayer]

    @property
    def kinds(self) -> dict[str, str]:
        """Give each layer that is not plainly linear its kind in `lora.supported`, and the first tensor beside them."""
        result = {}
        for layer in self.layers:
            if ".lora_embedding_" in layer.keys["A"]:
                result[layer.name] = "embedding"
            elif self.tensors[layer.keys["A"]].dim() > 2:
                result[layer.name] = "convolution"
        return {**result, **dict.fromkeys(self.others[:1], BESIDE)}

    def check_supported(self, verb: str) -> None:
        """Refuse an adapter of a kind that this verb does not take; ValueError."""
        check_supported(verb, self.title, self.config, self.kinds)

    @property
    def others(self) -> list[str]:
        """List the keys of tensors that are no factor of a triple: heads, modules trained in full, biases."""
        factors = {key for layer in self.layers for slot, key in layer.keys.items() if slot != "bias"}
        return [key for key in self.tensors if key not in factors]


def read_lora(path: Path, title: str | None = None) -> SavedLora:
    """Read the adapter of a run folder, or any PEFT LoRA folder. The scaling is PEFT's: alpha / r, or alpha / sqrt(r)
    with rsLoRA, by `alpha_pattern` and `rank_pattern`. Raises ValueError: no adapter is there, it is no LoRA, or its
    two files do not fit each other."""
    folder = find_adapter(path)
    config = read_adapter_config(folder)
    if config["peft_type"] != "LORA":
        check_supported("fit", str(folder), config)
    check_shape(config, _OF_LORA, str(folder / "adapter_config.json"))
    tensors = read_tensors(folder / "adapter_model.safetensors")
    layers = [_saved_layer(folder, config, tensors, *each) for each in keys_by_layer(tensors).items()]
    if not layers:
        raise UserError(f"{folder / 'adapter_model.safetensors'} holds no LoRA factors")
    return SavedLora(title or str(folder), folder, config, tensors, layers)


@contextmanager
def saved_lora(source: PeftModel | str | Path, name: str | None = None) -> Iterator[SavedLora]:
    """Read the adapter of a folder, or the one of this name (else the active one) of a live model, as it is on disk.
    Its folder may be gone afterwards."""
    if isinstance(source, (str, Path)):
        yield read_lora(Path(source))
        return
    name = name or active_adapter(source)
    with TemporaryDirectory() as scratch:
        source.save_pretrained(scratch, selected_adapters=[name])
        yield read_lora(Path(scratch) if name == "default" else Path(scratch, name), f"adapter {name!r}")


def active_adapter(model: Any) -> str:
    """Return the name of the one active LoRA adapter of a live model."""
    if not isinstance(model, PeftModel):
        raise UserError(
            f"the source is a {type(model).__name__} without an adapter; give the model that "
            f"peft.get_peft_model returned, or the folder it was saved to"
        )
    names = list(model.active_adapters)
    if len(names) != 1:
        raise UserError(f"the model has {len(names)} active adapters {names}; choose one with model.set_adapter(name)")
    check_supported("fit", f"adapter {names[0]!r}", {"peft_type": model.peft_config[names[0]].peft_type})
    return names[0]


def save_lora(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the two files of a PEFT LoRA folder, and their sums, into a new folder."""
    folder.mkdir()
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_sums(folder, ADAPTER_FILES)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save a live model's adapter as PEFT does, with the sums of its files; it appears whole or not at all."""

    def save(part: Path) -> None:
        model.save_pretrained(str(part))
        write_sums(part, ADAPTER_FILES)

    write_folder(folder, save)


_PROCESSING = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)


def copy_processing(folder: Path, out: Path) -> None:
    """Copy the tokenizer, or another processor, that was saved beside an adapter, because prompts are written by it.
    A link is followed only inside the folder, or a repository of the Hub's cache: it could publish another file."""
    repository = folder.resolve().parent.parent if folder.resolve().parent.name == "snapshots" else folder.resolve()
    for file in folder.iterdir():
        inside = not file.is_symlink() or file.resolve().is_relative_to(repository)
        if inside and file.is_file() and any(file.match(pattern) for pattern in _PROCESSING):
            shutil.copyfile(file, out / file.name)


def load_adapter(base: nn.Module, folder: Path, title: str | None = None, **options: Any) -> PeftModel:
    """Load the adapter on `base` with PEFT. Raises ValueError: its files are damaged, or do not fit this model."""
    read_adapter_config(folder)
    try:
        _follow_vocabulary(base, folder)
        return PeftModel.from_pretrained(base, folder, **options)  # type: ignore[arg-type]
    except MISFITS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{title or folder} does not fit the base model {type(base).__name__}: {reason}") from error


def check_layers(lora: SavedLora, model: Any, adapter: str = "default") -> None:
    """Raise ValueError where the file and the model have different LoRA layers: PEFT skips layers that the base lacks,
    and initialises those that the file lacks."""
    in_file, in_model = [layer.name for layer in lora.layers], [layer.name for layer in peft_layers(model, adapter)]
    base = type(model.get_base_model()).__name__
    for some, others, where in ((in_file, in_model, "the file alone"), (in_model, in_file, "the model alone")):
        if absent := [name for name in some if name not in others]:
            raise UserError(
                f"{lora.title} does not fit the base model {base}: the layer {absent[0]} is in {where}; give the run "
                f"whose base it was trained on, or, where another version of transformers renamed the layer, load the "
                f"adapter with PEFT and save it again"
            )


def check_finite(lora: SavedLora) -> None:
    """Raise ValueError for a factor that is not finite."""
    for layer in lora.layers:
        if not all(lora.tensors[layer.keys[factor]].isfinite().all() for factor in "AB"):
            raise UserError(f"the adapter's {layer.name} has a weight that is not finite; it diverged, or is damaged")


def _follow_vocabulary(base: Any, folder: Path) -> None:
    """Resize the base's token embeddings to the file's, which has those of a resized vocabulary."""
    file = folder / "adapter_model.safetensors"
    if not hasattr(base, "resize_token_embeddings") or not file.is_file():
        return
    try:
        embeddings: Any = base.get_input_embeddings()
    except NotImplementedError:  # an audio model has no token embeddings
        return
    names = {f"{name}.weight" for name, module in base.named_modules() if module is embeddings}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name = key.removeprefix(PREFIX).replace(".token_adapter", "").replace(".base_layer", "")
            if name in names:
                rows = tensors.get_slice(key).get_shape()[0]
                if rows != embeddings.weight.shape[0]:
                    base.resize_token_embeddings(rows, mean_resizing=False)


MISFITS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, re.error, SafetensorError)
"""PEFT raises these for a config that was written by hand, for another model, or for a damaged file."""


def by_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Look a layer up in `rank_pattern` or `alpha_pattern`, by PEFT's own rule."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), otherwise)


def _saved_layer(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], name: str, keys: dict[str, str]
) -> SavedLayer:
    file = folder / "adapter_model.safetensors"
    if not {"A", "B"} <= keys.keys():
        raise UserError(
            f"{file} is damaged: layer {name} has {' and '.join(keys.values())}, not both lora_A and lora_B"
        )
    A, B = tensors[keys["A"]], tensors[keys["B"]]
    rank = by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    if (A.shape[0], B.shape[1]) != (rank, rank) and not config.get("target_parameters"):
        raise UserError(
            f"{file} does not fit its adapter_config.json: {name} has factors of rank {A.shape[0]} and {B.shape[1]}, "
            f"the config says {rank}"
        )
    return SavedLayer(name, keys, rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

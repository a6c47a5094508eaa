"""EVA (Paischer et al. 2024): ranks and A from the principal components of each layer's inputs. PEFT's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from torch import Tensor
from transformers import PreTrainedModel

from pedyra.methods.adapter import with_adapter
from pedyra.methods.batches import training_batches
from pedyra.methods.method import Adaptation
from pedyra.methods.settings import method_settings, refuse_lora, require
from pedyra.models import lora_config
from pedyra.recipe import Recipe
from pedyra.tasks import Task


@dataclass(frozen=True, kw_only=True)
class EvaSettings:
    """Settings of EVA; the names are those of peft.EvaConfig."""

    rho: float = 2.0
    """A layer's rank is at most rho r."""
    tau: float = 0.99
    """Cosine similarity at which a component counts as converged."""
    whiten: bool = False

    def __post_init__(self) -> None:
        require(self.rho >= 1, f"method_settings.rho is {self.rho}; a layer's rank is at most rho r, so 1 or more")
        require(0 < self.tau < 1, f"method_settings.tau is {self.tau}; a cosine similarity in (0, 1)")


def prepare(base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None) -> Adaptation:
    """LoRA whose A rows are the top right-singular vectors of the layer's inputs over the training rows, B = 0.

    The budget of layers x r ranks goes, once, to the components that explain most variance over all layers; a layer
    that gets none is not adapted. The scaling stays alpha / r. Padding, and for causal_lm the prompt (label -100),
    are left out, as in PEFT.

    Raises:
        ValueError: another start, a batch with fewer vectors than rho r for some layer, or a layer with narrower
            inputs or none.
    """
    settings = method_settings(recipe, EvaSettings)
    refuse_lora(recipe, "EVA is a start of its own", "init")
    config = lora_config(recipe.lora, recipe.data.kind)
    config.init_lora_weights = "eva"
    config.eva_config = EvaConfig(
        rho=settings.rho,
        tau=settings.tau,
        whiten=settings.whiten,
        use_label_mask=recipe.data.kind == "causal_lm",  # a classifier has one label a row, not one a token
    )
    assert isinstance(config, LoraConfig)
    batches = training_batches(task, recipe)
    needed = round(recipe.lora.r * settings.rho)
    first = next(iter(batches))
    mask = first["labels"] != -100 if config.eva_config.use_label_mask else first.get("attention_mask")
    if mask is not None:
        _check_vectors(int(mask.sum()), needed)
    elif "input_ids" in first:
        _check_vectors(first["input_ids"].numel(), needed)

    def vectors(layer_input: Any, mask: Any, layer_name: str) -> Any:
        """PEFT's choice of tokens; a layer that sees one vector a row, such as BERT's pooler, has none to leave out."""
        x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
        if x.dim() != 2:
            return prepare_layer_inputs_fn_language_modeling(layer_input, mask, layer_name)
        _check_vectors(len(x), needed, f" for {layer_name.removeprefix('base_model.model.')}, which sees one a row")
        return x.contiguous()

    model = with_adapter(base_model, config, recipe.seed)
    _check_layers(model, first, needed)
    # PEFT's default finds the tokens that count by their mask; rows that are vectors have none.
    tokens: dict[str, Any] = {} if "input_ids" in first else {"prepare_model_inputs_fn": None}
    initialize_lora_eva_weights(model, batches, prepare_layer_inputs_fn=vectors, show_progress_bar=False, **tokens)
    return Adaptation(model=model)


def _check_layers(model: PeftModel, batch: Mapping[str, Tensor], needed: int) -> None:
    """One forward pass: a layer that sees no input, or is too narrow for its components, is told by name."""
    seen: set[str] = set()
    base: Any = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.add(name))  # type: ignore[attr-defined]
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**{key: value.to(model.device) for key, value in batch.items()})
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        width: Any = layer.in_features
        if name not in seen:
            raise ValueError(
                f"{name} takes no part in the forward pass, so EVA has no inputs to look at; leave it out with "
                f"lora.exclude_modules"
            )
        if width < needed:
            raise ValueError(
                f"the inputs of {name} have {width} components, but EVA looks for {needed} (lora.r x "
                f"method_settings.rho); lower one of them"
            )


def _check_vectors(found: int, needed: int, where: str = "") -> None:
    """PEFT passes over a layer that sees too few vectors in a batch, and would wait for it for ever."""
    if found < needed:
        raise ValueError(
            f"a batch has {found} vectors{where}, but EVA needs {needed} (lora.r x method_settings.rho) for as many "
            f"components; raise training.per_device_train_batch_size"
        )

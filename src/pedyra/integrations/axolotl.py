"""axolotl: `plugins: [pedyra.integrations.axolotl.PedyraPlugin]`, and a section `pedyra` in its YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, model_validator

from pedyra.errors import UserError
from pedyra.fitting.request import FitRequest
from pedyra.pe_dyra.method import PeDyra
from pedyra.trainer.adapt import adapt
from pedyra.trainer.fit import fit_trainer

LOG = get_logger("axolotl.pedyra")  # a child of the logger whose level axolotl sets
KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")
"""Kernels of axolotl that read the factors themselves and never call the layers, so that nobody sees their inputs."""


class PedyraSection(BaseModel, extra="forbid"):
    """The section `pedyra` of axolotl's file."""

    method: Literal["pedyra"] | None = None
    """The method by which ranks move while axolotl trains; none: they stay."""
    settings: dict[str, Any] = {}
    """Fields of PeDyra."""
    fit: FitRequest | None = None
    """What a fit is asked, {} for its defaults; the smaller adapter goes to the folder `fit` of output_dir."""

    @model_validator(mode="after")
    def _check(self) -> PedyraSection:
        if self.method is None and self.settings:
            raise UserError("pedyra.settings is given without pedyra.method: pedyra")
        self.config()  # to have a mistake told before anything is loaded
        return self

    def config(self) -> PeDyra | None:
        if self.method is None:
            return None
        try:
            return PeDyra(**self.settings)
        except TypeError as error:  # a field that is unknown, or of another type
            raise UserError(f"pedyra.settings: {error}") from error

    def sees_layers(self) -> bool:
        """Tell whether inputs of the layers are needed: by the input score, or by a fit."""
        return self.fit is not None or getattr(self.config(), "alpha", 1) != 1


class PedyraArgs(BaseModel):
    """The key that the plugin adds to axolotl's own."""

    pedyra: PedyraSection = PedyraSection()


class PedyraPlugin(BasePlugin):
    """Moves ranks while axolotl trains its LoRA, and asks at the end how small it may be."""

    trainer: Any = None  # until the end of training

    def get_input_args(self) -> str:
        return "pedyra.integrations.axolotl.PedyraArgs"

    def register(self, cfg: dict) -> None:
        if PedyraSection(**(cfg.get("pedyra") or {})).sees_layers():
            tell = LOG.warning if any(cfg.get(kernel) for kernel in KERNELS) else LOG.info
            tell("pedyra has to see the layers: %s are off", ", ".join(KERNELS))
            cfg |= dict.fromkeys(KERNELS, False)  # axolotl would switch on those that are not named

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer = trainer
        if (config := PedyraSection(**(cfg.pedyra or {})).config()) is not None:
            adapt(trainer, config)

    def post_train(self, cfg: Any, model: Any) -> None:
        trainer, self.trainer = self.trainer, None  # axolotl calls it twice
        request = PedyraSection(**(cfg.pedyra or {})).fit
        if trainer is not None and request is not None:
            try:
                result = fit_trainer(trainer, request)
                LOG.info("%s\nadapter     %s", result, result.save(Path(cfg.output_dir, "fit"), overwrite=True))
            except Exception as error:  # whatever it is, axolotl saves the trained adapter after this
                LOG.error("pedyra.fit: %s; ask the saved adapter: pedyra fit %s --data ROWS", error, cfg.output_dir)

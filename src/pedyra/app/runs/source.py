"""The rows and the base of a trained adapter whose folder does not name them; options of `pedyra fit` and `prove`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pedyra.app.runs.run_folder import run_of
from pedyra.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """The options for rows and base."""

    __pydantic_config__ = {"use_attribute_docstrings": True}  # for the help of the command line

    data: Path | None = None
    """Rows (.jsonl, .csv, ...): text, with a label or without; prompt, with a completion or without; or messages; with
    a run the columns of its recipe. A fit calibrates on half of them, a proof takes all."""
    run: Path | None = None
    """Take model and data from this run, where none that is given is one."""
    max_length: int | None = None
    """Cut the rows of --data to N tokens. Default: what the base can take."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Type of the base's weights, where no run says it. auto: as they were saved. Default: float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """Quantization of the base, where no run says it. Give that of the training (QLoRA: nf4)."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.data is None:
            raise UserError("--max-length cuts the rows of --data; leave it out: a run has a data.max_length")

    def folder(self, path: Path) -> Path | None:
        """Find the run folder that says model and data of the adapter in `path`, if there is one."""
        if self.run is not None and not (self.run / "recipe.yaml").is_file():
            raise UserError(
                f"{self.run} is no run folder (it has no recipe.yaml); give the output_dir of a training run"
            )
        folder = self.run or run_of(path)
        if folder is not None and self.loading:
            raise UserError(
                f"the recipe of {folder} says how its base is loaded; leave out --{' and --'.join(self.loading)}"
            )
        return folder

    @property
    def loading(self) -> dict[str, str]:
        """Return the options for the base's weights, as keys of `model` in a recipe."""
        options = {"dtype": self.dtype, "quantization": self.quantization}
        return {key: value for key, value in options.items() if value is not None}

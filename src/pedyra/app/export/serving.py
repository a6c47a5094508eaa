"""An exported folder is loaded: here are the commands where no destination was named, as `--for` names one."""

from __future__ import annotations

import json
from pathlib import Path

from pedyra.export.destinations import destination
from pedyra.export.loading import python_line
from pedyra.lora.folder import read_lora


def serving_lines(folder: Path, target: str) -> list[str]:
    """Write the lines of a shell that load what an export for this target left in `folder`: llama.cpp's for gguf,
    transformers' for merged weights, else PEFT's."""
    if target == "merged":
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        return [python_line(f"from transformers import {architectures[0] or 'AutoModel'} as Model", folder)]
    return destination("llama.cpp" if target == "gguf" else "peft").commands({folder.name: read_lora(folder)})

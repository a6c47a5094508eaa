"""The command line: exit codes, one clear line for a mistake, JSON lines beside what is printed."""

import errno
import importlib.metadata
import json
import signal
import subprocess
import sys

import pytest
import safetensors
import yaml
from file_changes import from_change
from typer.main import get_command

from pedyra.lab.cli import app, main

VERBS = tuple(get_command(app).commands)  # type: ignore[attr-defined]
RECIPE = {
    "model": {"name": "tiny-bert"},
    "method": "lora",
    "data": {"source": "toy", "max_length": 40, "train_rows": 32, "eval_rows": 8},
    "lora": {"r": 2},
    "training": {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2, "use_cpu": True},
}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(*arguments): exit code, stdout and stderr of one command run in tmp_path, which holds recipe.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        code = stopped.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_one_line(stderr, *parts):
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1
    assert all(part in stderr for part in parts), stderr


def test_the_version_is_that_of_the_package(call):
    assert call("--version")[:2] == (0, f"pedyra {importlib.metadata.version('pedyra')}\n")


def test_a_run_on_a_read_only_disk_is_read_and_what_would_write_there_says_so(call, tmp_path):
    call("train", "recipe.yaml", "data.eval_rows=96", "training.per_device_eval_batch_size=8")

    def refuse(event):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    with from_change(1, tmp_path / "runs", refuse):
        assert call("inspect", "runs/recipe")[0] == call("eval", "runs/recipe")[0] == 0
        assert call("report", "runs/recipe", "--out", "page.html")[0] == 0
        assert call("export", "runs/recipe", "--target", "peft", "--out", "exported")[0] == 0
        for writes in (
            ["report", "runs/recipe"],
            ["export", "runs/recipe", "--target", "peft"],
            ["fit", "runs/recipe", "--rank", "1"],
            ["train", "recipe.yaml", "--overwrite"],
        ):
            code, _, stderr = call(*writes)
            assert code == 2
            assert_one_line(stderr, "Read-only file system")


def test_a_fit_is_told_before_it_is_written(call, monkeypatch):
    call("train", "recipe.yaml", "data.eval_rows=96")

    def refuse(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pedyra.fitting.result.Fit.write", refuse)
    code, out, stderr = call("fit", "runs/recipe", "--rank", "1")
    assert code == 2 and "parameters" in out
    assert_one_line(stderr, "No space left on device")


def test_the_base_of_merged_weights_may_be_another(call, tmp_path, monkeypatch):
    call("train", "recipe.yaml")
    asked = []
    monkeypatch.setattr("pedyra.app.runs.export._base_of_recipe", lambda *given: asked.append(given[2]) or 1 / 0)
    for arguments in ([], ["--base", "elsewhere"]):
        with pytest.raises(ZeroDivisionError):
            call("export", "runs/recipe", "--target", "merged", "--out", "merged", *arguments)
    assert asked == [None, "elsewhere"]
    code, _, stderr = call("export", "runs/recipe", "--target", "peft", "--base", "elsewhere")
    assert code == 2
    assert_one_line(stderr, "base is given, but target peft needs no base model")


def test_a_diverged_run_says_so_and_still_has_its_report(call, tmp_path):
    """Its loss is no number, for which the record has null."""
    rate = ("training.learning_rate=1e8", "training.max_grad_norm=0", "training.max_steps=14", "method.interval=10")
    ends = ("method.initial_warmup=1", "method.final_warmup=1")
    code, out, _ = call("train", "recipe.yaml", "method=pedyra", *rate, *ends)
    assert code == 1 and "this run diverged. Lower training.learning_rate" in " ".join(out.split())
    assert rows(tmp_path / "runs/recipe/metrics.jsonl")[-1]["eval_loss"] is None
    assert {row["total_rank"] for row in rows(tmp_path / "runs/recipe/ranks.jsonl") if "total_rank" in row} == {26}
    assert (tmp_path / "runs/recipe/report.html").is_file()
    assert call("report", "runs/recipe", "--figures", "figures")[0] == 0


HEAVY = ("torch", "transformers", "peft", "datasets")


def test_a_wrong_path_or_method_is_told_before_anything_heavy_is_loaded(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path)}))
    commands = [["eval", "absent"], ["inspect", "absent"], ["export", "absent", "--target", "peft"], ["fit", "absent"]]
    commands += [["train", "absent.yaml"], ["train", "recipe.yaml"], ["train", "recipe.yaml", "method=pedira"]]
    code = "import sys\nfrom pedyra.lab.cli import main\ncodes = []\n"
    code += f"for arguments in {commands!r}:\n"
    code += "    try: main(arguments)\n    except SystemExit as ended: codes.append(ended.code)\n"
    code += f"print(codes, [name for name in {HEAVY!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout == f"{[2] * len(commands)} []\n", shown.stderr


def test_help_loads_nothing_heavy():
    asked = [["--help"], *([verb, "--help"] for verb in VERBS)]
    code = f"import sys\nfrom pedyra.lab.cli import main\nfor arguments in {asked!r}:\n"
    code += f"    try: main(arguments)\n    except SystemExit: pass\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.count("Usage") == len(asked) and shown.stdout.endswith("[]\n")


def test_train_eval_inspect_report_one_after_the_other(call, tmp_path):
    code, out, _ = call("train", "recipe.yaml", "seed=1", "--json", "train.jsonl")
    assert code == 0
    for shown in ("held-out accuracy", "runs/recipe", "query", "pedyra fit runs/recipe "):
        assert shown in out
    trained, *layers = rows(tmp_path / "train.jsonl")
    assert (trained["method"], trained["seed"], trained["metric"]) == ("lora", 1, "accuracy")
    assert len(layers) == 13
    assert (tmp_path / "runs" / "recipe" / "report.html").is_file()

    assert call("eval", "runs/recipe", "--json", "eval.jsonl")[0] == 0
    assert {"metric": "accuracy", "value": trained["value"]} in rows(tmp_path / "eval.jsonl")

    code, out, _ = call("inspect", "runs/recipe", "--json", "inspect.jsonl")
    assert code == 0
    *inspected, total = rows(tmp_path / "inspect.jsonl")
    assert [row["layer"] for row in inspected] != [] and total["layer"] == "total"
    assert total["parameters"] == sum(row["parameters"] for row in inspected)
    assert {"layer", "rank", "parameters"} <= inspected[0].keys()
    assert total["other_parameters"] > 0 and f"{total['other_parameters']:,} other parameters" in out  # the head

    code, out, _ = call("report", "runs/recipe", "--out", "page.html")
    assert code == 0 and "page.html" in out and (tmp_path / "page.html").is_file()

    code, _, err = call("train", "recipe.yaml")
    assert code == 2
    assert_one_line(err, "runs/recipe", "--resume", "--overwrite")


def test_dry_run_prints_the_plan_and_leaves_nothing(call, tmp_path):
    rank = ("method.interval=10", "method.initial_warmup=5", "method.final_warmup=10", "method.moves=6")
    arguments = ("method=pedyra", "training.max_steps=40", *rank, "--dry-run", "--json", "plan.jsonl")
    code, out, _ = call("train", "recipe.yaml", *arguments)
    assert code == 0
    for line in ("layers 13", "total rank 26", "total steps 40", "budget ranks", "adjustments 2", "moves 6"):
        assert line in " ".join(out.split())
    plan, *layers = rows(tmp_path / "plan.jsonl")
    assert (plan["total_steps"], plan["layers"], len(layers)) == (40, 13, 13)
    assert (plan["budget"], plan["adjustments"], plan["moves"]) == ("ranks", 2, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.jsonl", "recipe.yaml"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "absent.yaml"], ["absent.yaml", "does not exist"]),
        (["train", "recipe.yaml", "trainig.max_steps=3"], ["unknown key 'trainig'", "did you mean 'training'"]),
        (["train", "recipe.yaml", "training.optim=adamv"], ["training: ", "adamv"]),
        (["train", "recipe.yaml", "lora.init=best"], ["PEFT cannot adapt this model: ", "best"]),
        (["train", "recipe.yaml", "model.name=tiny-bart", "model.attn_implementation=fast"], ["model.name", "fast"]),
        (
            ["train", "recipe.yaml", "method=pedyra", "method.initial_warmup=9"],
            ["no rank could ever move", "of 4", "train for"],
        ),
        (["train", "recipe.yaml", "--resume"], ["no run to resume"]),
        (["eval", "."], [". is no run folder"]),
        (["fit", ".", "--max-length", "9"], ["--max-length cuts the rows of --data; leave it out"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, tmp_path, arguments, parts):
    code, _, err = call(*arguments)
    assert code == 2
    assert_one_line(err, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "arguments", [["train", "recipe.yaml", "--json", "absent/rows"], ["inspect", "absent"], ["eval", "absent"]]
)
def test_a_path_that_is_not_there_is_told_before_any_work(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2 and "absent" in err and "does not exist" in err


def test_a_missing_extra_is_the_users_to_install(call, monkeypatch):
    def missing(_):
        raise ImportError('needs gguf; run: pip install "pedyra[gguf]"')

    monkeypatch.setattr("pedyra.lora.inspection.inspect_adapter", missing)
    code, _, err = call("inspect", ".")
    assert code == 2
    assert_one_line(err, 'pip install "pedyra[gguf]"')


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("pedyra.lora.inspection.inspect_adapter", ["inspect", "."]),
        ("pedyra.app.recipe_sections.check_method", ["train", "recipe.yaml"]),
        ("pedyra.app.runs.setup.load_task", ["train", "recipe.yaml", "--dry-run"]),
        ("transformers.Trainer.training_step", ["train", "recipe.yaml"]),
    ],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), ImportError("broken install"), OSError(5, "I/O error"), ValueError("of torch")]
)
def test_our_own_mistake_keeps_its_traceback(call, monkeypatch, place, command, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(place, broken)
    with pytest.raises(type(error)) as told:  # an exception that reaches the interpreter: traceback, exit code 1
        call(*command)
    assert told.value is error


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C while the second step is taken."""
    from pedyra.app.runs.callbacks import MetricsLog

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "on_step_end", on_step_end)


def test_ctrl_c_exits_130_and_says_how_to_go_on(call, interrupt):
    code, out, _ = call("train", "recipe.yaml")
    assert code == 130 and "pedyra train runs/recipe/recipe.yaml --resume" in out


BY_LENGTH = "training.train_sampling_strategy=group_by_length"


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of AdaLoRA
@pytest.mark.parametrize("option", ["method=adalora", "training.save_only_model=true", BY_LENGTH])
def test_a_run_that_cannot_go_on_is_not_said_to(option, call, interrupt):
    code, out, _ = call("train", "recipe.yaml", option)
    assert code == 130 and "--resume" not in out and "--overwrite" in out
    assert call("train", "recipe.yaml", option, "--resume")[0] == 2

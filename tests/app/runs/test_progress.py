"""TrainingProgress: what is known so far, and plain lines where there is no terminal."""

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl

from pedyra.app.runs.callbacks import TrainingBar, TrainingProgress


def state(step, total=100) -> Any:
    return SimpleNamespace(global_step=step, max_steps=total)


def new_progress(*, terminal=False, history=()) -> Any:
    allocator = SimpleNamespace(ranks={"q": 5, "v": 3}, history=list(history), describe=lambda: {"schedule": {}})
    handle: Any = SimpleNamespace(allocator=allocator)
    screen = StringIO()
    console = Console(file=screen, width=120, force_terminal=terminal)
    progress = TrainingProgress(console, "accuracy")
    progress.handle, progress.total_rank = handle, 99
    return progress, screen


def test_the_status_tells_what_is_known():
    progress, _ = new_progress()
    assert progress.status() == "rank 8"
    progress.on_log(None, state(1), TrainerControl(), logs={"loss": 0.51234})
    progress.on_log(None, state(1), TrainerControl(), logs={"eval_loss": 0.5, "eval_accuracy": 0.8125})
    assert progress.status() == "loss 0.5123  accuracy 0.8125  rank 8"


@pytest.mark.parametrize(
    ("pruned", "added", "told"),
    [
        ([["q", 0, 0.5], ["q", 4, 0.1]], {"q": 1, "v": 1}, "adjusted at 20 (2 pruned, 2 added)"),
        ([["q", 0, 0.5]], {}, "adjusted at 20 (1 pruned)"),
        ([], {"q": 2, "v": 1}, "adjusted at 20 (3 added)"),
        ([], {}, "adjusted at 20"),
    ],
)
def test_the_last_adjustment_is_told_with_what_it_did(pruned, added, told):
    history = [{"step": 10, "pruned": [], "added": {"q": 9}}, {"step": 20, "pruned": pruned, "added": added}]
    progress, _ = new_progress(history=history)
    assert progress.status().endswith(told)


def test_plain_lines_come_at_most_twenty_times_a_run_beside_evaluations():
    progress, screen = new_progress()
    for step in range(1, 1001):
        progress.on_log(None, state(step, 1000), TrainerControl(), logs={"loss": 1.0})
    assert len(screen.getvalue().splitlines()) == 20
    progress.on_log(None, state(1000, 1000), TrainerControl(), logs={"eval_loss": 1.0, "eval_accuracy": 0.5})
    assert screen.getvalue().splitlines()[-1] == "step 1000/1000  loss 1.0000  accuracy 0.5000  rank 8"


def test_a_terminal_gets_trainers_bar_and_no_plain_lines(capsys: pytest.CaptureFixture[str]):
    progress, screen = new_progress(terminal=True)
    bar: Any = TrainingBar(progress)
    control, first = TrainerControl(), state(0)
    first.is_world_process_zero = True
    bar.on_train_begin(None, first, control)
    progress.on_log(None, first, control, logs={"loss": 0.25})
    bar.on_log(None, first, control, logs={"loss": 0.25, "ranks/total": 8})
    bar.on_train_end(None, first, control)
    shown = capsys.readouterr().err
    assert "0/100" in shown and "loss 0.2500" in shown and "ranks/total" not in shown and not screen.getvalue()

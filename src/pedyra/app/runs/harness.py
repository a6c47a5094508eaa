"""A run's model in lm-evaluation-harness: the only file that needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pedyra.app.models import load_tokenizer
from pedyra.app.recipe_sections import GENERATED
from pedyra.app.runs.evaluate import adapted_model, finished_run

NO_SANDBOX = "lm-evaluation-harness runs the code that the model writes on this machine, in no sandbox"


def evaluate_by_harness(
    run: Path, tasks: Sequence[str], *, limit: int | None = None, allow_code_execution: bool = False
) -> dict[str, float]:
    """`<task>_<metric>` -> value, for tasks of lm-evaluation-harness.

    The model is the base with the run's adapter in place, as it was trained; nothing is merged or written.

    Args:
        tasks: names that the harness knows, or YAML files of tasks of one's own.
        limit: only so many rows of each task.
        allow_code_execution: also tasks that are marked as unsafe, whose code the harness runs in no sandbox.

    Raises:
        ImportError: the harness is not installed; with the line that installs it.
        ValueError: a model that is no language model, a task that is not known, one that would run code and may not.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError(
            '--harness needs lm-evaluation-harness; run in a checkout: pip install ".[harness]"'
        ) from None
    _, recipe, adapter = finished_run(run)
    kind = recipe.data.kind
    if kind not in GENERATED:
        raise ValueError(f"--harness judges language models, of data.kind {' or '.join(GENERATED)}; this run is {kind}")
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"--harness {missing[0]}: there is no such file from {Path.cwd()}")
    manager = TaskManager(include_path=[str(file.resolve().parent) for file in files] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--harness: lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    tokenizer = load_tokenizer(recipe.model)
    model: Any = adapted_model(recipe, adapter, None, tokenizer).get_base_model().eval()
    model.to(_device())
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal" if kind == "causal_lm" else "seq2seq",
        batch_size=recipe.training["per_device_eval_batch_size"],
    )
    if allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what its metric of code asks for beside the argument below
    try:
        found: Any = lm_eval.simple_evaluate(
            model=lm, tasks=names, task_manager=manager, limit=limit, confirm_run_unsafe_code=allow_code_execution
        )
    except ValueError as error:
        if allow_code_execution or "confirm_run_unsafe_code" not in str(error):
            raise
        raise ValueError(
            f"--harness {','.join(tasks)}: a task is marked as unsafe, and {NO_SANDBOX}; allow it with "
            f"--allow-code-execution, or judge code in a sandbox: `generate: {{humaneval: {{}}}}` in the recipe"
        ) from None
    return {
        f"{task}_{metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float))
    }


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

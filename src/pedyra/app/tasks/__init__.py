"""Tasks: a recipe's data, tokenised and split, with its collator and metric. They know no adapter.

One file a family: text (classes and numbers; glue), question_answering, seq2seq, causal_lm. `test_sets` and
`generation` judge what a model writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedyra.app.tasks.load import load_task as load_task
    from pedyra.app.tasks.task import Task as Task

__all__ = ["Task", "load_task"]


def __getattr__(name: str):
    if name in __all__:  # late, because a grid looks up named tasks without loading torch
        from pedyra.app.tasks import load

        return getattr(load, name)
    raise AttributeError(f"module 'pedyra.app.tasks' has no attribute {name!r}")

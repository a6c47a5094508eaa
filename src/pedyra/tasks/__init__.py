"""Tasks: a recipe's data, tokenised and split, with its collator and metric. They know no adapter."""

from pedyra.tasks.task import Task, load_task

__all__ = ["Task", "load_task"]

"""The README.md of an adapter's folder: a model card that says what was done, for a person and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"

_LOADING = """A LoRA adapter that was trained with pedyra, and that loads without it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/folder")  # base: the base model named below
```
"""


def adapter_card(
    title: str,
    rows: Mapping[str, str],
    *,
    base: str | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """The card as Markdown, with the Hub's metadata on top.

    Args:
        rows: what was done, as name -> value; an empty value is left out.
        base: the base model, and `dataset` the data, of which only a name of the Hub goes into the metadata.
    """
    data = ModelCardData(
        base_model=base if names_repository(base) else None,
        datasets=[dataset] if dataset is not None and names_repository(dataset) else None,
        library_name="peft",
        metrics=list(metrics) or None,
        tags=["pedyra", "lora"],
    )
    table = [f"| {name} | {' '.join(told.split()).replace('|', ' ')} |" for name, told in rows.items() if told]
    text = "\n".join([f"# {title}", "", _LOADING, "| | |", "| --- | --- |", *table, ""])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def names_repository(name: str | None) -> bool:
    """Whether this is the name of a repository as the Hub has them, owner/name, and no path of this machine."""
    if name is None or name.startswith((".", "/", "~")) or Path(name).exists():
        return False
    return name.count("/") == 1 and "\\" not in name


def shown_name(name: str | None) -> str:
    """A base model's name as others may read it: of a path of this machine only the last part."""
    if not name:
        return ""
    return name if names_repository(name) else Path(name).name


def shown_ranks(ranks: Sequence[int]) -> str:
    """The ranks of an adapter's layers in one line."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    each = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{len(ranks)} layers of {each}, {sum(ranks)} in total"

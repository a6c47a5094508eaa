"""The model card of an adapter's folder says what was done, for a person and for the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
_LOADING = """A LoRA adapter that was made with pedyra, and that loads without it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/folder")  # base: the base model named below
```
"""


def adapter_card(
    title: str,
    rows: Mapping[str, str],
    *,
    text: str = "",
    base: str | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
) -> str:
    """Write the card as Markdown: the Hub's metadata, `rows` of name and value (an empty value is left out), `text`.
    The metadata has `base`, the model, and `dataset` only where they are names of the Hub."""
    data = ModelCardData(
        base_model=base if names_repository(base) else None,
        datasets=[dataset] if dataset and names_repository(dataset) else None,
        library_name="peft",
        metrics=list(metrics) or None,
        tags=["pedyra", "lora"],
    )
    table = [f"| {name} | {' '.join(value.split()).replace('|', ' ')} |" for name, value in rows.items() if value]
    body = "\n".join([f"# {title}", "", _LOADING, "| | |", "| --- | --- |", *table, *(["", text] if text else []), ""])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def names_repository(name: str | None) -> bool:
    """Tell whether this is the name of a repository of the Hub, owner/name, and no path of this machine."""
    if name is None or name.startswith((".", "/", "~")) or "\\" in name or Path(name).exists():
        return False
    return name.count("/") == 1


def shown_name(name: str | None) -> str:
    """Give a base model's name as others may read it: a path of this machine is cut to its last part."""
    return name if name and names_repository(name) else Path(name or "").name


def shown_ranks(ranks: Sequence[int]) -> str:
    """Tell the ranks of an adapter's layers in one line."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    each = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{len(ranks)} layers of {each}, {sum(ranks)} in total"


def shown_megabytes(count: float) -> str:
    """Write so many megabytes for a reader: 12.5 -> "12.50 MB", 0.0125 -> "12.5 kB"."""
    return f"{count:,.2f} MB" if count >= 0.1 else f"{1000 * count:.1f} kB"

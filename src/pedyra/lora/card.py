"""The model card of an adapter's folder says what was done, for a person and for the Hub, and a folder is pushed
there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants

from pedyra.errors import UserError

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
    """Write the card as Markdown, with the Hub's metadata on top.

    Args:
        rows: what was done, as name -> value; an empty value is left out.
        text: more of it, in Markdown, below them.
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
    body = "\n".join([f"# {title}", "", _LOADING, "| | |", "| --- | --- |", *table, *(["", text] if text else []), ""])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def names_repository(name: str | None) -> bool:
    """Tell whether this is the name of a repository of the Hub, owner/name, and no path of this machine."""
    if name is None or name.startswith((".", "/", "~")) or Path(name).exists():
        return False
    return name.count("/") == 1 and "\\" not in name


def shown_name(name: str | None) -> str:
    """Give a base model's name as others may read it: a path of this machine is cut to its last part."""
    if not name:
        return ""
    return name if names_repository(name) else Path(name).name


def shown_ranks(ranks: Sequence[int]) -> str:
    """Tell the ranks of an adapter's layers in one line."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    each = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{len(ranks)} layers of {each}, {sum(ranks)} in total"


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a LoRA adapter by pedyra",
) -> str:
    """Push a folder to a model repository, which is made where it is not there yet, and return the address of it.

    Args:
        private: of a repository that is made.
        token: by default the one of `hf auth login` or HF_TOKEN.
        revision: the branch, which is made where it is not there yet.

    Raises:
        ValueError: the Hub cannot be asked, or says no, in words.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # of `name` alone it adds the user's
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # the errors of a connection have changed their class with the client's library
        raise UserError(f"{repo_id} cannot be pushed to on the Hub: {error}") from error
    return f"{constants.ENDPOINT}/{name}"

"""A disk that is full: how it is recognised, and what can be done about a run that it stopped."""

from __future__ import annotations

import errno

from pedyra.allocate.checkpoint_folder import last_complete_checkpoint, list_checkpoints
from pedyra.app.runs.run_folder import RunFolder

# How safetensors, and torch's writer of zip archives, tell that a write failed; neither raises OSError.
_FAILED_WRITES = ("No space left on device", "PytorchStreamWriter", "inline_container", "iostream error")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write that found no space is at the bottom of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(sign in str(error) for sign in _FAILED_WRITES):
        return True
    below = error.__cause__ or error.__context__
    return below is not None and is_disk_full(below)


def what_now(folder: RunFolder, *, is_back: bool) -> str:
    """What a full disk has left of a run, and how it goes on.

    Args:
        is_back: what is in the folder is the run that this one was to replace.
    """
    where, with_ranks = f"disk full while writing {folder.path}", folder.ranks.is_file()
    if is_back:
        return f"{where}, before the first step; the run that was there is kept"
    kept = list_checkpoints(folder.path)
    if not kept:
        return f"{where}, before the first checkpoint; free space and train again"
    try:
        whole = last_complete_checkpoint(folder.path, with_ranks=with_ranks)[0].name
    except ValueError:
        return (
            f"{where}; {kept[-1].name} holds the adapter, but not what a resume needs: "
            f"free space, then train again with --overwrite"
        )
    return f"{where}; {whole} is whole: free space, then continue with pedyra train {folder.recipe} --resume"

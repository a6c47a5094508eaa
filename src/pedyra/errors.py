"""A mistake of whoever uses pedyra, told in one line: the value, the rule, the repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What was given cannot be done, and the message says what to give instead.

    The command line prints it and ends with exit code 2. Any other exception is a fault of the code, here or in a
    library below, and keeps its traceback.
    """


@contextmanager
def telling(what: str, *kinds: type[Exception], reason: Callable[[Exception], str] = str) -> Iterator[None]:
    """Make an error a UserError that begins with `what`: the section or the file that a user gave to a library.

    It is entered around a call of that library alone, or a fault of ours would be hidden.

    Args:
        kinds: classes of the errors; none: any, as of a library that reads files by others, whose errors share none.
        reason: what of the error is told, where its own text is not the clearest.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        told = " ".join(reason(error).split()) or type(error).__name__
        raise UserError(f"{what}: {told}") from error


REFUSALS = (TypeError, ValueError, ImportError)
"""Libraries refuse what they are given by these; any other error of theirs is a fault."""

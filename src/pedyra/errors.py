"""A user's mistake is reported in one line: the value, the rule, the repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """The input cannot be used, and the message says what to give instead.

    The command line prints it and ends with exit code 2. Any other exception is a fault of the code, here or in a
    library below, and keeps its traceback.
    """


@contextmanager
def as_user_error(what: str, *kinds: type[Exception], reason: Callable[[Exception], str] = str) -> Iterator[None]:
    """Convert a library's error to a UserError that begins with `what`: the section or the file of the user.

    Only the call of that library stands inside, or a bug of ours would be hidden.

    Args:
        kinds: classes of the errors; none: any, for a library that reads files, whose errors share no class.
        reason: makes the text of the message where the error's own text is unclear.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        text = " ".join(reason(error).split()) or type(error).__name__
        raise UserError(f"{what}: {text}") from error


REFUSALS = (TypeError, ValueError, ImportError)
"""Libraries reject an input by these errors; any other error is a bug."""
